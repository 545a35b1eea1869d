"""Makes a random checkpoint in Meta's layout: the real shapes, seeded weights, a made-up tokenizer.

    python tools/random_checkpoint.py 1b /tmp/llama1b            # the shapes of Llama 3.2 1B, 2.5 GB
    python tools/random_checkpoint.py small /tmp/small --shards 2 --seed 7
    python tools/random_checkpoint.py params.json /tmp/mine      # the sizes of a params.json of your own

It says nothing sensible, but it is as large and as fast as the real one: for tests, benchmarks and ports.
"""

import base64
import itertools
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
from llama3_from_scratch import SHARD_AXIS, fill_params, weight_shapes
from parts import printable
from parts.files import local_path, read_marks, state, write_marks, written_whole
from parts.layouts import check_params, free_memory, read_json
from parts.programs import flags_of, run_program

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


MARK = "random_checkpoint.json"  # what this program wrote there: each file's size and time


def check_folder(folder):
    """ValueError if a folder holds what this program did not write, or somebody has changed since."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    ours = read_marks(folder / MARK)
    for path in sorted(folder.glob("*")):
        if path.name != MARK and (path.name not in ours or ours[path.name] != state(path)):
            raise ValueError(
                f"{folder}: {path.name} there is not of this program; give it a folder of its own"
            )


def write_checkpoint(folder, params, weights, shards=1, tokenizer=None):
    """Writes params.json, consolidated.*.pth and tokenizer.model (a copy of `tokenizer`, or made up).

    The shards of an earlier random checkpoint in the folder are deleted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(weights, shards)
    ours = read_marks(folder / MARK)
    for old in folder.glob("consolidated.*.pth"):
        old.unlink()
        ours.pop(old.name, None)

    def write(name, how):
        with written_whole(folder / name) as part, open(part, "wb") as file:
            how(file)
        ours[name] = state(folder / name)
        write_marks(folder / MARK, ours)

    write("params.json", lambda file: file.write(json.dumps(params).encode()))
    for n, shard in enumerate(parts):
        write(f"consolidated.{n:02}.pth", lambda file, shard=shard: torch.save(shard, file))
    if tokenizer:
        write("tokenizer.model", lambda file: file.write(Path(tokenizer).read_bytes()))
    else:
        lines = made_up_tokenizer(params["vocab_size"] - 256)
        write("tokenizer.model", lambda file: file.write(lines.encode()))
    return folder


def random_checkpoint(
    folder, params, shards=1, seed=0, tied=False, dtype=torch.bfloat16, tokenizer=None
):
    """A random checkpoint on disk in Meta's layout. params: as in params.json. Returns the folder."""
    weights = random_weights(fill_params(params), seed, tied, dtype)
    return write_checkpoint(folder, params, weights, shards, tokenizer)


def check_room(folder, params, shards, itemsize):
    """ValueError unless memory and disk have room: all weights twice over in memory if they are split."""
    numbers = [math.prod(shape) for shape in weight_shapes(params).values()]
    size = sum(numbers) * itemsize
    needed = size * (1 + (shards > 1)) + max(numbers) * 4
    free = free_memory("cpu")
    if needed > free:
        raise ValueError(f"it takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    room = shutil.disk_usage(there).free
    if size > room:
        raise ValueError(f"{folder}: {size / 1e9:.1f} GB to write, {room / 1e9:.1f} GB are free")


def run(argv):
    parser = flags_of(description=__doc__)
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or a params.json")
    parser.add_argument("folder", type=Path, help="a new one, or one that this program has made")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tokenizer", help="a tokenizer.model to copy instead of a made-up one")
    args = parser.parse_args(argv)
    if not 1 <= args.shards <= 1000 or not 0 <= args.seed < 2**63:
        parser.error("--shards must be from 1 to 1000, --seed from 0 to 2**63 - 1")
    if args.shape not in SHAPES and not local_path(args.shape).is_file():
        raise ValueError(f"{args.shape}: neither a file nor one of {', '.join(SHAPES)}")
    if args.tokenizer and not local_path(args.tokenizer).is_file():
        raise ValueError(f"{args.tokenizer}: not a file; a tokenizer.model is expected")
    folder = local_path(args.folder)
    dtype, tied = getattr(torch, args.dtype), args.shape in TIED
    params = SHAPES.get(args.shape) or read_json(local_path(args.shape))
    whole = check_params(params, args.shape)
    check_folder(folder)
    check_room(folder, whole, args.shards, dtype.itemsize)
    tokenizer = args.tokenizer and local_path(args.tokenizer)
    random_checkpoint(folder, params, args.shards, args.seed, tied, dtype, tokenizer)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{printable(folder)}: {printable(args.shape)}, {args.shards} shards, {size / 1e9:.3g} GB"
    )


def main(argv=None):
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
