"""Makes a random checkpoint in Meta's layout: the real shapes, seeded weights, a made-up tokenizer.

    python tools/random_checkpoint.py 1b /tmp/llama1b            # the shapes of Llama 3.2 1B, 2.5 GB
    python tools/random_checkpoint.py small /tmp/small --shards 2 --seed 7
    python tools/random_checkpoint.py params.json /tmp/mine      # the sizes of a params.json of your own

It says nothing sensible, but it is as large and as fast as the real one: for tests, benchmarks and ports.
"""

import argparse
import base64
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
from llama3_from_scratch import SHARD_AXIS, fill_params, weight_shapes

LLAMA_3 = {
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
SHAPES = {
    "small": {
        "dim": 64,
        "n_layers": 3,
        "n_heads": 8,
        "n_kv_heads": 2,
        "vocab_size": 512,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 32,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "1b": LLAMA_3
    | {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "3b": LLAMA_3
    | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
    "8b": LLAMA_3
    | {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "70b": LLAMA_3
    | {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096},
}
TIED = ("1b", "3b")


def random_weights(params, seed=0, tied=False, dtype=torch.bfloat16):
    """Weights in Meta's names: matrices with deviation 1/sqrt(columns), norms around one (not one)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(params).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = ((1 + noise / 5) if len(shape) == 1 else noise / math.sqrt(shape[1])).to(
            dtype
        )
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


def split(weights, shards):
    """The weights as Meta splits them over model-parallel processes: a list of dicts."""
    parts = [{} for _ in range(shards)]
    for name, whole in weights.items():
        dim = SHARD_AXIS.get(name.split(".")[-2], 0)
        if shards < 1 or whole.dim() == 2 and whole.shape[dim] % shards:
            raise ValueError(
                f"{name} of shape {tuple(whole.shape)} cannot be split over {shards} shards"
            )
        for n, part in enumerate(parts):
            part[name] = (
                whole if whole.dim() == 1 or shards == 1 else whole.chunk(shards, dim)[n].clone()
            )
    return parts


def made_up_tokenizer(ranks):
    """The lines of a tokenizer.model: the 256 bytes, then pairs and triples of bytes, in order."""
    sequences = itertools.chain.from_iterable(
        itertools.product(range(256), repeat=n) for n in (1, 2, 3)
    )
    lines = (
        f"{base64.b64encode(bytes(s)).decode()} {n}\n"
        for n, s in enumerate(itertools.islice(sequences, ranks))
    )
    return "".join(lines)


def write_checkpoint(folder, params, weights, shards=1, tokenizer=None):
    """Writes params.json, consolidated.*.pth and tokenizer.model (a copy of `tokenizer`, or made up)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(weights, shards)
    for old in folder.glob("consolidated.*.pth"):
        old.unlink()
    (folder / "params.json").write_text(json.dumps(params))
    for n, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{n:02}.pth")
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    else:
        (folder / "tokenizer.model").write_text(made_up_tokenizer(params["vocab_size"] - 256))
    return folder


def random_checkpoint(
    folder, params, shards=1, seed=0, tied=False, dtype=torch.bfloat16, tokenizer=None
):
    """A random checkpoint on disk in Meta's layout. params: as in params.json. Returns the folder."""
    weights = random_weights(fill_params(params), seed, tied, dtype)
    return write_checkpoint(folder, params, weights, shards, tokenizer)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or a params.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.model to copy instead of a made-up one"
    )
    args = parser.parse_args()
    if args.shape not in SHAPES and not Path(args.shape).is_file():
        print(
            f"error: {args.shape}: neither a file nor one of {', '.join(SHAPES)}", file=sys.stderr
        )
        sys.exit(2)
    dtype, tied = getattr(torch, args.dtype), args.shape in TIED
    try:
        params = SHAPES.get(args.shape) or json.loads(Path(args.shape).read_text())
        random_checkpoint(args.folder, params, args.shards, args.seed, tied, dtype, args.tokenizer)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {args.shape}, {args.shards} shards, {size / 1e9:.3g} GB")


if __name__ == "__main__":
    main()
