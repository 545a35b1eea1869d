"""How fast could several GPUs be, and where do more of them stop helping? Computed, not measured.

    python tools/scale.py > tools/scale.md
    python tools/scale.py --choose                 which model fits which machine, in how many bits?

One row of tokens, decoded by N GPUs that each hold 1/N of every matrix but the embedding, and all of that
(tensor parallelism as in Megatron-LM, Shoeybi et al. 2019): whole heads, a slice of F, a slice of V. A step
reads each GPU's weights and keys and values once, and sums x over the GPUs twice a layer. All assumptions
stand in the two tables below.
"""

import functools
import math
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
import torch

from llama3_from_scratch import fill_params, weight_shapes
from parts import quantized
from parts.programs import flags_of, run_program
from tools.random_checkpoint import SHAPES, TIED

# params.json of the releases (llama-models, models/sku_list.py).
MODELS = {
    "8B": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
    },
    "70B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 4096,
    },
    "405B": {
        "dim": 16384,
        "n_layers": 126,
        "n_heads": 128,
        "ffn_dim_multiplier": 1.2,
        "multiple_of": 4096,
    },
}
# GB of memory, GB/s of memory, GB/s to other GPUs of the node (NVLink, one direction), GB/s to other nodes
# (one network port a GPU): NVIDIA's data sheets for the SXM modules, and for the DGX machines around them.
GPUS = {
    "A100": (80, 2039, 300, 25),
    "H100": (80, 3350, 450, 50),
    "H200": (141, 4800, 450, 50),
}
SHARE = 0.69  # of the memory's bandwidth that a step reaches: 8B on one A100 in gpt-fast
LATENCY = 35e-6  # seconds that a sum over the GPUs of a node takes beside its bytes: 8B on eight A100s there
FAR = 20e-6  # seconds more where it crosses nodes: an assumption
NODE, POSITIONS = 8, 8192  # GPUs of a node; tokens in the cache
OTHER = 2  # GB a GPU for all else
WIDTH = 2  # bytes of a bfloat16 number
# What gpt-fast's README says of A100s (80 GB, held to 330 W): model, GPUs, bytes of a weight, tokens a second
PUBLISHED = {
    ("8B", 1, 2): 93.83, ("8B", 2, 2): 149.1, ("8B", 4, 2): 217.21, ("8B", 8, 2): 276.01,
    ("70B", 2, 2): 16.03, ("70B", 4, 2): 37.45, ("70B", 8, 2): 58.78,
    ("8B", 1, 1): 137.64, ("70B", 8, 1): 75.58, ("405B", 8, 1): 15.6,
}  # fmt: skip
SHARE_8_BIT = 0.51  # of the bandwidth that its 8-bit weights reach: 8B on one A100 there
FITTED = (
    ("8B", 1, 2),
    ("8B", 8, 2),
    ("8B", 1, 1),
)  # what gave the shares and LATENCY; the rest is foretold


def sizes(model):
    """All params, and the bytes of the embedding, which everyone holds, and of what is cut into shares."""
    params = fill_params(MODELS[model] | {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5})
    whole = {name: WIDTH * math.prod(shape) for name, shape in weight_shapes(params).items()}
    embedding = whole.pop("tok_embeddings.weight")
    return params, embedding, sum(whole.values())


def step(model, gpu, N, positions=POSITIONS):
    """Of one GPU of N: bytes of memory, bytes read, messages and their bytes, seconds to read and to sum."""
    params, embedding, shared = sizes(model)  # of the embedding a step reads a row
    _, bandwidth, near, far = GPUS[gpu]
    heads = max(1, params["n_kv_heads"] // N)  # some are held twice
    cache = 2 * WIDTH * params["n_layers"] * heads * params["head_dim"] * positions
    sums = 2 * params["n_layers"]  # of x: after wo, after w2
    messages = sums + 2 if N > 1 else 0  # and of the logits, in float32, and of the token
    summed = sums * WIDTH * params["dim"] + 4 * params["vocab_size"] + 8
    moved = summed * 2 * (N - 1) / N  # a ring sends each number twice, less its own part
    reading = (shared / N + cache) / (SHARE * bandwidth * 1e9)
    link, wait = (far, LATENCY + FAR) if N > NODE else (near, LATENCY)
    return (
        shared / N + embedding + cache + OTHER * 1e9,
        shared / N + cache,
        messages,
        moved,
        reading,
        messages * wait + moved / (link * 1e9),
    )


def table(model):
    lines = [
        "| GPUs | GB a GPU | GB read a token | messages a token | MB sent | A100 | H100 | H200 "
        "| time for messages (H100) |",
        "| ---: " * 9 + "|",
    ]
    for N in (1, 2, 4, 8, 16):
        memory, read, messages, moved, *_ = step(model, "H100", N)
        speeds = []
        for gpu, (room, *_) in GPUS.items():
            *_, reading, summing = step(model, gpu, N)
            speeds.append(
                f"{1 / (reading + summing):.1f}" if memory <= room * 1e9 else "does not fit"
            )
        *_, reading, summing = step(model, "H100", N)
        lines.append(
            f"| {N} | {memory / 1e9:.1f} | {read / 1e9:.2f} | {messages} | {moved / 1e6:.2f} "
            f"| {' | '.join(speeds)} | {summing / (reading + summing):.0%} |"
        )
    return "\n".join(lines)


def enough(model, gpu):
    """The most GPUs, of 1 to 16, whose last doubling still gives 1.25 times the speed."""
    seconds = {N: sum(step(model, gpu, N)[-2:]) for N in (1, 2, 4, 8, 16)}
    return max(N for N in seconds if N == 1 or seconds[N // 2] / seconds[N] >= 1.25)


def report():
    rows = []
    for (model, N, width), known in PUBLISHED.items():
        *_, reading, summing = step(model, "A100", N, positions=200)
        if width == 1:
            reading *= SHARE / SHARE_8_BIT / 2
        found, fitted = 1 / (reading + summing), (model, N, width) in FITTED
        rows.append(
            f"| {model} | {N} | {8 * width} bits | {known} | {found:.1f} | "
            f"{'fitted' if fitted else f'{found / known - 1:+.0%}'} |"
        )
    limits = "\n".join(
        f"- {model}: {', '.join(f'{enough(model, gpu)} {gpu}s' for gpu in GPUS)}"
        for model in MODELS
    )
    tables = "\n\n".join(f"### {model}\n\n{table(model)}" for model in MODELS)
    machines = "\n".join(
        f"| {gpu} | {a} GB | {b:,} GB/s | {c} GB/s | {d} GB/s |"
        for gpu, (a, b, c, d) in GPUS.items()
    )
    near, far = LATENCY * 1e6, (LATENCY + FAR) * 1e6
    return f"""# Several GPUs: what to expect

Computed by `python tools/scale.py > tools/scale.md`. Nothing here was measured by us: it is a plan, for what
`torchrun` does with the script. One row of tokens, bfloat16, a cache of {POSITIONS:,} positions.

## Assumptions

Every GPU holds 1/N of each matrix and of the keys and values (above 8 GPUs each of the 8 heads is held by
several), and all of the embedding, of which a token reads one row. A step reads the rest once at {SHARE:.0%}
of the memory's bandwidth. After `wo` and `w2` the GPUs sum D numbers; at the end V logits in float32 and the
token. Each of these messages takes {near:.0f} µs within a node of {NODE} GPUs, {far:.0f} µs across nodes, and
the time of its bytes. Nothing overlaps. {OTHER} GB a GPU are for all else.

| | memory | bandwidth | to the same node | to another node |
| --- | ---: | ---: | ---: | ---: |
{machines}

Bandwidths are from NVIDIA's data sheets (SXM modules, one direction of NVLink, one network port a GPU).
The {SHARE:.0%} and the {near:.0f} µs are fitted to figures that gpt-fast publishes for A100s, which were held
to 330 W and joined in a hybrid cube mesh. What that cost is in them, and so in the tables below; the other
figures are foretold, within 15%:

| model | A100s | weights | gpt-fast, tok/s | here, tok/s | error |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

## Tokens a second

{tables}

## Where more GPUs stop helping

The most GPUs, of 1, 2, 4, 8, 16, whose last doubling still gives 1.25 times the speed, whether or not the
model fits fewer:

{limits}

The messages do not get shorter with more GPUs: a step of {sizes("8B")[0]["n_layers"]} layers waits for \
{step("8B", "H100", 2)[2]} of them, one of {sizes("405B")[0]["n_layers"]}
layers for {step("405B", "H100", 2)[2]}. More GPUs then serve more rows, not faster ones.
"""


# ------------------------------------------------------------------------------------ which bits?

SYSTEM, PROGRAM = 3, 1  # GB of a laptop that the system and a browser take, and the program itself
MACHINES = {  # GB that are left for weights and cache
    **{f"laptop of {GB} GB": GB - SYSTEM - PROGRAM for GB in (8, 16, 32)},
    **{f"GPU of {GB} GB": GB - OTHER for GB in (8, 16, 24, 80)},
}
BITS = ("bfloat16", *quantized.KINDS)


@functools.cache
def weights_of(shape, kind):
    """Bytes of the weights of a release, in bfloat16 or in 8 or 4 bits. 1B and 3B have one table for two."""
    params, tied = fill_params(SHAPES[shape]), shape in TIED
    if kind != "bfloat16":
        return quantized.size_of(weight_shapes(params), kind, torch.bfloat16, tied)
    shapes = weight_shapes(params)
    if tied:
        del shapes["output.weight"]
    return WIDTH * sum(map(math.prod, shapes.values()))


def needed(shape, kind, positions=POSITIONS):
    """GB for a release: weights, and keys and values of one row in bfloat16."""
    params = fill_params(SHAPES[shape])
    cache = 2 * WIDTH * params["n_layers"] * params["n_kv_heads"] * params["head_dim"] * positions
    return (weights_of(shape, kind) + cache) / 1e9


def choice():
    """Two tables: GB for each release and format, and for each machine the most bits that fit."""
    models = ("1b", "3b", "8b", "70b")
    lines = [f"| {'GB':<16} | {' | '.join(model.upper() for model in models)} |"]
    lines.append("| --- |" + " ---: |" * len(models))
    for kind in BITS:
        numbers = (f"{needed(model, kind):.1f}" for model in models)
        lines.append(f"| {kind:<16} | {' | '.join(numbers)} |")
    lines += ["", *lines[:2]]
    lines[-2] = lines[-2].replace(f"{'GB':<16}", f"{'':<16}")
    lines[-1] = "| --- |" + " --- |" * len(models)
    for machine, room in MACHINES.items():
        fits = (
            next((kind for kind in BITS if needed(model, kind) <= room), "–") for model in models
        )
        lines.append(f"| {machine:<16} | {' | '.join(fits)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    def work():
        parser = flags_of(description=__doc__)
        parser.add_argument(
            "--choose",
            action="store_true",
            help="instead: the tables of docs/quantization.md, what to choose on which machine",
        )
        sys.stdout.write(choice() if parser.parse_args(argv).choose else report())

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
