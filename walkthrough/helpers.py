"""What the cells of walkthrough.md use and do not explain: loading, printing, comparing."""

from collections.abc import Sequence
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts.inside import record

EIGHT = llama.fill_params(
    {  # Llama 3.1 8B, from its params.json
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
)
ONE = llama.fill_params(
    {  # Llama 3.2 1B
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
)


def is_small(folder: str) -> bool:
    """Is a model so small that a cell may run it many times?"""
    files = [Path(folder), *Path(folder).glob("*")]
    return sum(file.stat().st_size for file in files if file.is_file()) < 100e6


def load(folder: str) -> llama.Model:
    """A model without a word about it: a small one in float32, a large one as its file has it."""
    torch.set_grad_enabled(False)  # nothing is trained until section 10
    return llama.load_model(folder, dtype="float32" if is_small(folder) else None, quiet=True)


def ids_of(text: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """A prompt as token ids, with the token that begins every text."""
    return [*vars(tokenizer)["begin"], *llama.encode(tokenizer, text)]


def words(ids: Sequence[int], tokenizer: tiktoken.Encoding) -> list[str]:
    """Each token's own text."""
    return [tokenizer.decode([id]) for id in ids]


def pieces(ids: Sequence[int], tokenizer: tiktoken.Encoding) -> str:
    """Tokens side by side in brackets, which no token of ours contains."""
    lines = [""]
    for word in words(ids, tokenizer):
        if len(lines[-1]) + len(word) > 84:
            lines.append("")
        lines[-1] += f"⟦{word}⟧"
    return "\n".join(lines)


def in_brackets(parts: Sequence[bytes]) -> str:
    """Bytes side by side in the same brackets."""
    return "".join(f"⟦{part.decode()}⟧" for part in parts)


def top(logits: Tensor, tokenizer: tiktoken.Encoding, n: int = 10) -> tuple[list[str], list[float]]:
    """The n likeliest tokens and their probabilities."""
    probs, ids = logits.float().softmax(-1).topk(n)
    return words(ids.tolist(), tokenizer), [round(p, 5) for p in probs.tolist()]


def next_word(logits: Tensor, tokenizer: tiktoken.Encoding) -> str:
    """The likeliest token and its probability, in words."""
    (word,), (p,) = top(logits, tokenizer, 1)
    return f"{word!r} {p:.0%}"


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding? The same products summed in another order differ in their last bits."""
    tolerance = 1e-4 if theirs.dtype == ours.dtype == torch.float32 else 0.06
    ours, theirs = ours.float(), theirs.float()
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= tolerance * theirs.norm())


def letters(p: llama.Params) -> dict[str, int]:
    """The sizes of a model by the letters that stand for them."""
    D, H, K, E = p["dim"], p["n_heads"], p["n_kv_heads"], p["head_dim"]
    return {"D": D, "H": H, "K": K, "G": H // K, "E": E, "F": p["ffn_dim"], "V": p["vocab_size"]}


def shape(name: str, dims: str, tensor: Tensor, params: llama.Params) -> None:
    """Prints a tensor's letters and shape, checked against the params, and its shape in Llama 3.1 8B."""
    tokens = {letter: size for letter, size in zip(dims.split(), tensor.shape) if letter in "BTS"}
    ours, theirs = (
        {**sizes, **tokens, "HE": sizes["H"] * sizes["E"], "E/2": sizes["E"] // 2}
        for sizes in (letters(params), letters(EIGHT))
    )
    llama.check_dims(ours, name, dims, tensor)
    here, in_8b = (
        " × ".join(f"{sizes[letter]:,}" for letter in dims.split()) for sizes in (ours, theirs)
    )
    print(f"{name:<9}{dims.replace(' ', ' × '):<15}here {here:<17}in 8B {in_8b}")


def first(vector: Tensor, n: int = 8, digits: int = 2, wide: int = 0) -> str:
    """The first numbers of a vector, in a line. wide: the least room of each."""
    wide = wide or digits + 4
    shown = "  ".join(f"{x + 0.0:{wide}.{digits}f}" for x in vector[:n].tolist())
    return shown + "  …" * (len(vector) > n)


def table(
    values: Tensor, rows: Sequence[str], columns: Sequence[str] = (), digits: int = 2
) -> None:
    """Prints a matrix with names for its rows and columns."""
    wide = max(len(repr(row)) for row in rows) + 2
    if columns:
        print(" " * wide + "".join(f"{column:>9}" for column in columns))
    for row, line in zip(rows, values.tolist()):
        print(f"{row:<{wide}}" + "".join(f"{x + 0.0:>9.{digits}f}" for x in line))


def go_on(ids: list[int], model: llama.Model, most: int = 24) -> str:
    """What the model writes after these tokens, each time the likeliest."""
    return llama.complete(ids, model, max_new_tokens=most)


def chances(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    """The probabilities from which `sample` draws, the likeliest first."""
    p = (logits.sort(descending=True).values[: top_k or None] / temperature).softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0
    p = torch.nn.functional.pad(p / p.sum(), (0, max(0, 8 - len(p))))
    return [round(share, 3) for share in p.tolist()]


def hits(logits: Tensor, ids: Sequence[int]) -> int:
    """At how many places is the likeliest token the one that really follows?"""
    return (logits[0, :-1].argmax(-1) == torch.tensor(ids[1:])).sum().item()


def ranks_of(tokenizer: tiktoken.Encoding) -> dict[bytes, int]:
    """The bytes of each token that was found by merging, and its rank."""
    return dict(vars(tokenizer)["_mergeable_ranks"])


def telling_unit(
    trace: dict[str, Tensor], weights: llama.Weights, params: llama.Params
) -> tuple[int, Tensor, dict[str, Tensor]]:
    """A unit of the last layer whose gate is shut for about half of the tokens, and that is loud for others.

    Its number, its z, and its gate, up and hidden, for all tokens but begin_of_text, which is often huge.
    """
    layer = f"layers.{params['n_layers'] - 1}."
    parts = {
        name: trace[f"{layer}feed_forward.{name}"][0, 1:].float()
        for name in ("gate", "up", "hidden")
    }
    is_shut = parts["gate"].abs() < 0.3
    shut = is_shut.float().mean(0)
    loud = parts["hidden"].abs().sort(0).values[-3]
    ignored = (parts["up"].abs() * is_shut).amax(0)
    unit = int((loud * ignored * ((shut > 0.3) & (shut < 0.7))).argmax())
    w1 = weights[f"{layer}feed_forward.w1.weight"][unit].float()
    z = trace[f"{layer}ffn_norm"][0, 1:].float() @ w1
    return unit, z, {name: values[:, unit] for name, values in parts.items()}


def trainable(weights: llama.Weights) -> llama.Weights:
    """Copies of the weights that can learn; of a large model the last layer alone can."""
    large = sum(w.numel() for w in weights.values()) > 2e8
    last = max(
        (name for name in weights if name.startswith("layers.")),
        key=lambda name: int(name.split(".")[1]),
    )
    layer = ".".join(last.split(".")[:2]) + "."
    return {
        name: w if large and not name.startswith(layer) else w.detach().clone().requires_grad_()
        for name, w in weights.items()
    }


def learning(weights: llama.Weights) -> list[Tensor]:
    """Those that can learn."""
    return [w for w in weights.values() if w.requires_grad]


__all__ = ["EIGHT", "ONE", "record"]
__all__ += [name for name, it in globals().items() if getattr(it, "__module__", "") == __name__]
