"""What the exercises of walkthrough.md need: heads set to zero, a port compared."""

import contextlib
import io
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import llama3_from_scratch as llama
from walkthrough.helpers import ids_of, is_small, record


def copying(model: llama.Model, name: str) -> tuple[list[int], float]:
    """A text in which a name comes up again, but for its last token; and that token's probability."""
    tokenizer = model[2]
    named = llama.encode(tokenizer, name)
    text = ids_of("Once upon a time, there was a little fox named", tokenizer) + named
    text += llama.encode(tokenizer, " who lived near the sea.") + named
    return text, without(model, text, [])


def without(model: llama.Model, text: Sequence[int], heads: Sequence[tuple[int, int]]) -> float:
    """The probability of a text's last token with these heads (layer, number) set to zero."""
    weights, params, _ = model

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        for i, n in heads:
            if name == f"layers.{i}.attention.heads":
                tensor = tensor.clone()
                tensor[:, n] = 0
        return tensor

    last = torch.tensor([len(text) - 2])
    logits = llama.forward(torch.tensor([text[:-1]]), weights, params, last=last, probe=probe)
    return round(logits[0, -1].softmax(-1)[text[-1]].item(), 3)


def layers_to_break(params: llama.Params) -> list[int]:
    """All layers of a small model, the middle and the last of a large one."""
    L = params["n_layers"]
    return list(range(L)) if L <= 8 else [L // 2, L - 1]


def without_each(model: llama.Model, text: Sequence[int], layer: int) -> Tensor:
    """The probability of a text's last token without each head of a layer: one pass, row n loses head n."""
    weights, params, _ = model
    rows = torch.arange(params["n_heads"])

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        if name == f"layers.{layer}.attention.heads":  # B H T E, here H H T E
            tensor = tensor.clone()
            tensor[rows, rows] = 0
        return tensor

    batch = torch.tensor([text[:-1]] * len(rows))
    last = torch.full((len(rows),), len(text) - 2)
    logits = llama.forward(batch, weights, params, last=last, probe=probe)
    return logits[:, -1].float().softmax(-1)[:, text[-1]]


def lookers(model: llama.Model, text: Sequence[int]) -> list[tuple[int, int]]:
    """The heads (layer, number) whose last token looks mostly at the earlier place of the one to come."""
    weights, params, _ = model
    trace: dict[str, Tensor] = {}
    llama.forward(torch.tensor([text[:-1]]), weights, params, probe=record(trace))
    place = text.index(text[-1])
    return [
        (i, n)
        for i in range(params["n_layers"])
        for n in range(params["n_heads"])
        if trace[f"layers.{i}.attention.probs"][0, n, -1, place] > 0.5
    ]


@contextlib.contextmanager
def quiet(said: io.StringIO) -> Iterator[None]:
    """Collects what is said in `said`; what goes to stderr, about loading, is dropped."""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        yield


def compared(ids: Sequence[int], model: llama.Model, folder: str, probe: llama.Probe) -> str:
    """What tools/compare.py says of a pass with this probe: its first two lines."""
    if not is_small(folder):
        return "(compare runs the model once for each mistake that it knows: not shown for a large one)"
    from tools import compare

    weights, params, _ = model
    port: dict[str, Tensor] = {}
    keep = record(port)
    llama.forward(
        torch.tensor([ids]), weights, params, probe=lambda *step: keep(*step[:2], probe(*step))
    )
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as place, quiet(said):
        file = Path(place) / "port.safetensors"
        save_file(port, file)
        compare.main([str(file), "--weights", folder])
    lines = said.getvalue().splitlines()[:2]
    return "\n".join(textwrap.fill(line, 94) for line in lines)
