"""How well does a model tell a text, and how far is a quantized one from it? Perplexity and KL divergence.

    python tools/perplexity.py TEXT --weights DIR
    python tools/perplexity.py TEXT --weights DIR --quantize int4
    python tools/perplexity.py TEXT --weights DIR --base-dtype float32

The tokens of TEXT are cut into windows, each of which is read alone: the tokens that begin any prompt, then
the next ones of the text. The first half of a window is only read; of the second half each token counts, by
what the model said before it. What is left at the end and fills no window is not read. With --quantize, or
--base-dtype, a second model reads the same windows: the weights as they are, which is the base. From both
models' probabilities at each such token come the divergence of the model from the base, KL(base || model),
and by how much the right token's probability has changed. Nothing is stored. An error behind ± is the
standard deviation over the tokens / sqrt(their number), as if they were independent.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import printable, quantized, vocabulary
from parts.files import read_input
from parts.inside import check_finite
from parts.programs import flags_of, run_program
from parts.progress import progress
from parts.table import folded, plural, width_of

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def windows_of(ids: list[int], begin: list[int], size: int) -> Iterator[list[int]]:
    """The windows of a text: `begin`, then the next tokens, `size` in all; the rest is left out."""
    new = size - len(begin)
    for a in range(0, len(ids) - new + 1, new):
        yield [*begin, *ids[a : a + new]]


def log_probs(window: Tensor, model: llama.Model) -> Tensor:
    """The log-probabilities (N V) before each token of the second half of a window (W), in float32."""
    weights, params, tokenizer = model
    half = len(window) // 2
    logits = llama.forward(window[None].to(weights["norm.weight"].device), weights, params)
    check_finite(logits, weights)
    logits = logits[0, half - 1 : -1]
    return vocabulary.of_tokens(logits, tokenizer).log_softmax(-1).cpu()


def divergences(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) at each token (N), from log-probabilities (N V), summed in float64."""
    parts = zip(base.split(64), other.split(64))
    found = [(p.double().exp() * (p.double() - q.double())).nan_to_num(0).sum(-1) for p, q in parts]
    return torch.cat(found)


@torch.inference_mode()
def measured(
    windows: list[list[int]], model: llama.Model, base: llama.Model | None = None
) -> dict[str, Tensor]:
    """Of each token that counts (N): "nll"; with a base also "base_nll", "kl", "same_top", "change"."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, values: Tensor) -> None:
        found.setdefault(name, []).append(values.double())

    with progress("measuring", len(windows), "window") as advance:
        for ids in windows:
            window = torch.tensor(ids)
            right = window[len(window) // 2 :, None]
            other = log_probs(window, model)
            keep("nll", -other.gather(-1, right)[:, 0])
            if base is not None:
                first = log_probs(window, base)
                keep("base_nll", -first.gather(-1, right)[:, 0])
                keep("kl", divergences(first, other))
                keep("same_top", first.argmax(-1) == other.argmax(-1))
                keep("change", found["nll"][-1].neg().exp() - found["base_nll"][-1].neg().exp())
            advance(1)
    return {name: torch.cat(values) for name, values in found.items()}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean, and how far it may be off: standard deviation / sqrt(N)."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def report(found: dict[str, Tensor]) -> list[str]:
    """What was found, line by line."""

    def perplexity(name: str) -> str:
        mean, error = mean_and_error(found[name])
        return f"{math.exp(mean):.4f} ± {math.exp(mean) * error:.4f}"

    lines = [f"perplexity            {perplexity('nll')}"]
    if "kl" not in found:
        return lines
    lines.append(f"of the base           {perplexity('base_nll')}")
    more, error = mean_and_error(found["nll"] - found["base_nll"])
    lines.append(f"ratio                 {math.exp(more):.5f} ± {math.exp(more) * error:.5f}")
    mean, error = mean_and_error(found["kl"])
    lines.append(f"mean KL divergence    {mean:.6f} ± {error:.6f}")
    median, high = found["kl"].quantile(torch.tensor([0.5, 0.99]).double()).tolist()
    most = found["kl"].max()
    lines.append(f"its median, 99 %, max {median:.6f}  {high:.6f}  {most:.6f}")
    share, error = mean_and_error(found["same_top"])
    lines.append(f"same likeliest token  {share:.2%} ± {error:.2%}")
    root = found["change"].pow(2).mean().sqrt()
    mean, error = mean_and_error(found["change"])
    lines.append(
        f"right token's probability: RMS of change {root:.3%}, mean {mean:+.3%} ± {error:.3%}"
    )
    steps = found["change"].quantile(torch.tensor(PERCENTILES).double() / 100).tolist()
    said = [f"{n} %: {value:+.2%}" for n, value in zip(PERCENTILES, steps)]
    said[0] = f"percentiles of its change: {said[0]}"
    lines.append(folded(said, "  ", width_of(sys.stdout)))
    return lines


# ------------------------------------------------------------------------------------ another order


def in_another_order(model: llama.Model, seed: int) -> llama.Model:
    """The same model with its dimensions in a random order: what it computes stays, groups of 32 do not.

    Weights that were in 4 bits before lie on a grid in each 32 of a row, where 4 bits again would cost
    nothing. Mixed among all columns they are as others. D, F, and within each head of v are mixed.
    """
    weights, params, tokenizer = model
    generator = torch.Generator().manual_seed(seed)
    D, F, E = params["dim"], params["ffn_dim"], params["head_dim"]
    dims, units, inside = (torch.randperm(size, generator=generator) for size in (D, F, E))
    new: llama.Weights = {}
    for name, w in weights.items():
        kind = name.split(".")[-2]
        if kind in ("w1", "w3"):
            w = w[units]
        if kind == "wv":
            w = w.unflatten(0, (-1, E))[:, inside].flatten(0, 1)
        if kind == "w2":
            new[name] = w[dims][:, units]
        elif kind == "wo":
            new[name] = w[dims].unflatten(1, (-1, E))[:, :, inside].flatten(1)
        else:
            new[name] = w[..., dims]
    return new, params, tokenizer


# ------------------------------------------------------------------------------------ the program


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = flags_of(description=__doc__)
    add = parser.add_argument
    add("text", help="a file of text in UTF-8, or - for stdin")
    add("--weights", metavar="DIR", default=str(llama.TINY), help="as of llama3_from_scratch.py")
    add("--quantize", choices=quantized.KINDS, help="measure this against the weights as they are")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="compute in this")
    add(
        "--base-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="the base computes in this (default: as --dtype)",
    )
    add("--window", metavar="N", type=int, default=512, help="tokens of a window (default 512)")
    add("--windows", metavar="N", type=int, default=0, help="read the first N only (default: all)")
    add("--layers", metavar="N", type=int, help="of both models the first N layers only")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    add(
        "--shuffle",
        metavar="SEED",
        type=int,
        help="put the model's dimensions into another order, which changes nothing but the groups "
        "of --quantize int4: for weights that were in 4 bits before",
    )
    args = parser.parse_args(argv)
    if args.window < 4:
        parser.error(f"--window {args.window}: must be 4 or more")
    if args.windows < 0:
        parser.error(f"--windows {args.windows}: must be 0, for all, or more")
    if args.shuffle is not None and not args.quantize:
        parser.error("--shuffle does nothing without --quantize")
    return args


def cut(args: argparse.Namespace, model: llama.Model) -> list[list[int]]:
    """The windows of the text that are asked for. ValueError if there is not one."""
    _, params, tokenizer = model
    given = sys.stdin.buffer.read() if args.text == "-" else read_input(args.text)
    ids = llama.encode(tokenizer, given.decode("utf-8-sig", "replace"))
    begin = vars(tokenizer)["begin"]
    if args.window > params["max_seq_len"]:
        raise ValueError(f"--window {args.window}: the model's context is {params['max_seq_len']}")
    windows = list(windows_of(ids, begin, args.window))
    if not windows:
        raise ValueError(
            f"{args.text}: {plural(len(ids), 'token')}, too few for a window of {args.window}; take a longer "
            "text, or a smaller --window"
        )
    return windows[: args.windows or None]


def run(args: argparse.Namespace) -> None:
    """Loads one model or two, measures, and prints."""
    options: dict[str, Any] = {"n_layers": args.layers}
    base = None
    other = args.base_dtype or args.dtype
    if args.quantize or args.base_dtype:
        base = llama.load_model(args.weights, args.device, other, **options)
    if args.shuffle is not None and base is not None:
        base = in_another_order(base, args.shuffle)
        shards = {"the base": base[0]}
        dtype = getattr(torch, args.dtype or str(base[0]["norm.weight"].dtype)[6:])
        held = quantized.load(
            shards, base[1], args.device, dtype, lambda name, slices: slices[0], args.quantize
        )
        model: llama.Model = held, base[1], base[2]
    else:
        model = llama.load_model(
            args.weights, args.device, args.dtype, quantize=args.quantize, **options
        )
    windows = cut(args, model)
    found = measured(windows, model, base)
    what = f"{printable(args.weights)}: {args.quantize or args.dtype or 'as it is'}"
    what += f", {plural(len(windows), 'window')} of {args.window} tokens"
    print(f"{what}, of which {len(found['nll']):,} count")
    print(*report(found), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the program. Returns the exit code."""
    return run_program(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
