"""Other people's dumps of a pass: files of several kinds, names of several projects, layouts of all sorts.

A dump holds tensors that another implementation computed. read_dump takes them from the file, recognise gives
them the script's names, and readings lists the ways in which one of them can be laid out.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from llama3_from_scratch import Params
from parts import first_line, naming, printable
from parts.files import local_path, openable, read_text
from tools.mistakes import to_pairs

Tensors = dict[str, Tensor]
Reading = tuple[str, Tensor]  # words on the layout, and the tensor as the script lays it out

# ------------------------------------------------------------------------------------ files

NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**33  # numbers in one tensor; a .pt can claim many more than it holds
KINDS = ".safetensors, .npz, .npy, a folder of .npy files, .pt"


def read_dump(given: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file or folder by their own names, and its metadata. ValueError in one line."""
    path = local_path(given)
    if not path.exists():
        raise ValueError(f"{given}: no such file; a dump is expected ({KINDS})")
    try:
        if path.is_dir():
            return dict(arrays_of_folder(path)), {}
        if not path.is_file():
            raise ValueError(f"not a file; a dump is expected ({KINDS})")
        if path.suffix in (".npz", ".npy"):
            return dict(arrays_of(path)), {}
        if path.suffix in (".pt", ".pth", ".bin"):
            return dict(flattened(load_pickle(path))), {}
        return read_safetensors(path)
    except ValueError as problem:
        raise ValueError(f"{given}: {problem}") from None


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with openable(path) as name, safetensors.safe_open(name, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
            return held, file.metadata() or {}
    except Exception as problem:  # safetensors, torch and the system each have their own
        said = first_line(problem)
        raise ValueError(f"not a safetensors file ({said}); a dump is {KINDS}") from None


def arrays_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The arrays of a .npz file, or that of a .npy file under the file's name."""
    try:
        import numpy
    except ImportError:
        raise ValueError("to read it numpy is needed: pip install numpy") from None
    try:
        held = numpy.load(path, allow_pickle=False)  # a pickle could run anything
        arrays = {path.stem: held} if path.suffix == ".npy" else {name: held[name] for name in held}
    except Exception as problem:  # numpy, zipfile and the system each have their own
        raise ValueError(f"not a file of numpy's arrays ({first_line(problem)})") from None
    for name, array in arrays.items():
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        try:
            yield name, torch.from_numpy(numpy.ascontiguousarray(array).reshape(array.shape))
        except TypeError:
            raise ValueError(
                f"{printable(name, 100)} holds {array.dtype}, which torch does not know; "
                "save bfloat16 as float32"
            ) from None


def arrays_of_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Each .npy file below a folder, by its path: layers/0/out.npy is layers.0.out."""
    files = sorted(folder.rglob("*.npy"))
    if not files:
        raise ValueError("a folder without .npy files; a dump is expected")
    for file in files:
        name = ".".join(file.relative_to(folder).parts).removesuffix(".npy")
        try:
            yield from ((name, tensor) for _, tensor in arrays_of(file))
        except ValueError as problem:
            raise ValueError(f"{printable(name, 100)}.npy: {problem}") from None


def load_pickle(path: Path) -> object:
    """What torch.save wrote, if it is tensors alone: nothing in the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises a dozen kinds
        other = re.search(r"GLOBAL ([\w.]+)", str(problem))
        said = first_line(problem).partition(". ")[0]
        if other:
            said = f"it also holds {other[1]}, which is not loaded"
        raise ValueError(f"not a file of tensors alone ({said}); save a dict of tensors") from None


def flattened(held: object, name: str = "", depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dicts, lists and tuples by the path to them: hidden_states.0 in a dict of tuples."""
    if isinstance(held, Tensor):
        if held.layout != torch.strided or held.is_quantized or held.is_meta:
            raise ValueError(f"{printable(name, 100)} is no plain tensor ({held.layout})")
        yield name or "tensor", held.detach()
        return
    inside: Any = ()
    if isinstance(held, dict):
        inside = held.items()
    elif isinstance(held, (list, tuple)):
        inside = enumerate(held)
    for key, value in inside if depth else ():
        yield from flattened(value, f"{name}.{key}" if name else str(key), depth - 1)


# ------------------------------------------------------------------------------------ names

LAYER = (
    "attention_norm attention.q attention.k attention.v attention.q_rotated attention.k_rotated "
    "attention.scores attention.probs attention.heads attention.out after_attention ffn_norm "
    "feed_forward.gate feed_forward.up feed_forward.hidden feed_forward.out out"
).split()


def traced_names(params: Params) -> list[str]:
    """The names of all tensors of a pass, in its order, without the tokens."""
    layers = [f"layers.{i}.{part}" for i in range(params["n_layers"]) for part in LAYER]
    return ["tok_embeddings", *layers, "norm", "logits"]


# What does a module give whose weight has this name, in the script's words?
OUTPUTS = {
    "attention.wq": "attention.q", "attention.wk": "attention.k", "attention.wv": "attention.v",
    "attention.wo": "attention.out", "feed_forward.w1": "silu feed_forward.gate",
    "feed_forward.w3": "feed_forward.up", "feed_forward.w2": "feed_forward.out", "output": "logits",
}  # fmt: skip
INPUTS = {
    "attention.wo": "attention.heads", "feed_forward.w2": "feed_forward.hidden",
    "ffn_norm": "after_attention", "output": "norm",
}  # fmt: skip
# Modules without a weight of their own, and what transformers returns.
MODULES = {
    "layers.{}": "layers.{}.out", "trf_blocks.{}": "layers.{}.out",
    "layers.{}.self_attn": "layers.{}.attention.out", "layers.{}.attention": "layers.{}.attention.out",
    "trf_blocks.{}.att": "layers.{}.attention.out", "layers.{}.self_attn.1": "layers.{}.attention.probs",
    "layers.{}.mlp": "layers.{}.feed_forward.out", "layers.{}.feed_forward": "layers.{}.feed_forward.out",
    "trf_blocks.{}.ff": "layers.{}.feed_forward.out", "layers.{}.mlp.act_fn": "layers.{}.feed_forward.gate",
    "attentions.{}": "layers.{}.attention.probs", "last_hidden_state": "norm",
    "past_key_values.{}.0": "layers.{}.attention.k_rotated", "past_key_values.{}.1": "layers.{}.attention.v",
    "input_ids": "tokens",
}  # fmt: skip


def named_by_module() -> dict[str, str]:
    """The script's name by the pattern of a module's, for Meta's, Hugging Face's and rasbt's modules."""
    table = dict(MODULES)
    for names in naming.NAMES:
        ours = names[0]
        part = ours.removeprefix("layers.{}.")
        before = ours.removesuffix(part)
        for name in names:
            pattern = name.removeprefix("model.")
            how, _, given = OUTPUTS.get(part, part).rpartition(" ")
            table[pattern] = f"{how} {before}{given}".strip()
            if part in INPUTS:
                table[f"{pattern}.input"] = (before if part != "output" else "") + INPUTS[part]
    return table


TABLE = named_by_module()


def pattern_of(name: str) -> tuple[str, str]:
    """A module's name without what frameworks put around it, {} for its layer, and the layer."""
    parts = [part for part in name.split(".") if part not in naming.WRAPPERS]
    while parts[:1] == ["model"]:
        parts = parts[1:]
    if parts[-2:] == ["output", "0"] or parts[-2:] == ["input", "0"]:
        parts = parts[:-1]
    if parts[-1:] == ["output"]:  # "output" alone is Meta's head
        parts = parts[:-1] or parts
    layer = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if layer is None:
        return ".".join(parts), ""
    pattern = ".".join([*parts[:layer], "{}", *parts[layer + 1 :]])
    if pattern not in TABLE and pattern.endswith(".0"):  # the first of a module's outputs
        pattern = pattern.removesuffix(".0")
    return pattern, str(int(parts[layer]))


def name_of(name: str, params: Params) -> str:
    """The script's name of a tensor, with "silu " before it where that is to come; "" if it is not known."""
    L = params["n_layers"]
    pattern, layer = pattern_of(name)
    if pattern == "hidden_states.{}":  # of L + 1; the last one is after the norm
        return {0: "tok_embeddings", L: "norm"}.get(int(layer), f"layers.{int(layer) - 1}.out")
    return TABLE.get(pattern, "").format(layer)


def unstacked(tensors: Tensors, params: Params) -> Tensors:
    """hidden_states and attentions of all layers in one tensor become one for each."""
    found: Tensors = {}
    for name, x in tensors.items():
        count = {"hidden_states": params["n_layers"] + 1, "attentions": params["n_layers"]}.get(
            name
        )
        if count is not None and x.dim() > 2 and x.shape[0] == count:
            found |= {f"{name}.{n}": part for n, part in enumerate(x)}
        else:
            found[name] = x
    return found


def read_map(given: str) -> dict[str, str]:
    """A file's object from their names to the script's. ValueError in one line."""
    try:
        if not local_path(given).is_file():
            raise ValueError("not a file" if Path(given).exists() else "no such file")
        names = json.loads(read_text(local_path(given)))
        if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
            raise ValueError("expected an object from their names to ours")
    except (OSError, ValueError, RecursionError) as problem:
        said = str(problem).removeprefix(f"{given}: ")
        raise ValueError(f"{given}: {said}") from None
    return names


def expanded(names: dict[str, str], held: Tensors, source: str, params: Params) -> dict[str, str]:
    """A map with a line for each tensor: {} in a name stands for the layer. ValueError for one of no use."""
    traced = {*traced_names(params), "tokens"}
    found = {}
    for theirs, ours in names.items():
        ours = "tokens" if ours == "input_ids" else ours
        pattern = r"(\d+)".join(map(re.escape, theirs.split("{}")))
        hits = [hit for hit in (re.fullmatch(pattern, name) for name in held) if hit]
        if not hits:
            shown = printable(theirs, 100)
            raise ValueError(f"{source}: no tensor {shown}, which --map names")
        for hit in hits:
            layer = hit[1] if "{}" in theirs else "0"
            new = ours.replace("{}", str(int(layer)))
            if new not in traced:
                shown = printable(new, 100)
                raise ValueError(f"--map: the script traces no tensor called {shown}")
            if new in found.values():
                raise ValueError(f"{source}: with --map two tensors are called {new}")
            found[hit[0]] = new
    return found


def without_a_wrapper(held: Tensors) -> Tensors:
    """Tensors in a dict in a dict, {"trace": {…}}, lose the outer name, if nobody's names begin so."""
    first = {name.partition(".")[0] for name in held}
    known = {pattern.partition(".")[0] for pattern in TABLE} | {
        "model",
        "hidden_states",
        *naming.WRAPPERS,
    }
    if len(first) == 1 and not first & known and all("." in name for name in held):
        return {name.partition(".")[2]: x for name, x in held.items()}
    return held


def recognise(
    held: Tensors, names: dict[str, str], source: str, params: Params
) -> tuple[Tensors, dict[str, str]]:
    """The tensors under the script's names, and what each was called. What is not known keeps its name."""
    held = unstacked(without_a_wrapper(held), params)
    mapped = expanded(names, held, source, params)
    traced = {*traced_names(params), "tokens"}
    found: Tensors = {}
    called: dict[str, str] = {}
    direct = {}  # by our names: is it that, or what comes before silu?
    for name, x in held.items():
        ours = mapped.get(name) or (name if name in traced else name_of(name, params))
        silu, _, ours = ours.rpartition(" ")
        if ours not in traced:
            ours = name
        if silu and x.dtype in NUMBERS:
            x = torch.nn.functional.silu(x.double()).to(x.dtype)
        if ours in found:
            if direct[ours] and silu:
                continue
            same = found[ours].shape == x.shape and torch.equal(found[ours], x)
            if not same and (direct[ours] == (not silu)):
                both = f"{printable(called[ours], 100)} and {printable(name, 100)}"
                raise ValueError(
                    f"{source}: {both} are both {ours}, and are not the same: take one of them out, or say "
                    "with --map what they are"
                )
            if same and direct[ours]:
                continue
        found[ours] = x
        called[ours] = name
        direct[ours] = not silu
    return found, called


def in_halves(called: Iterable[str]) -> bool:
    """Are these names of a project whose q and k hold the first half of all pairs, then the second?"""
    return any(
        re.search(r"self_attn\.[qk]_proj|W_(query|key)|past_key_values", it) for it in called
    )


MASKED = -5e3  # a score that stands for -inf: e to this is 0 in every number format


def without_a_mask(x: Tensor) -> bool:
    """Does no number of scores or probs (… T S) stand for a later token that may not be looked at?"""
    later = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
    return bool(later.any()) and bool((x[..., later] > MASKED).all())


def mask_scores(theirs: Tensors) -> set[str]:
    """Masks scores that were kept before their mask; returns their names.

    That there was a mask later on the probs tell: later tokens have none. Without probs what follows tells.
    """
    found = set()
    for name in [name for name in theirs if re.fullmatch(r"layers\.\d+\.attention\.scores", name)]:
        x, probs = theirs[name], theirs.get(name.replace("scores", "probs"))
        if x.dtype not in NUMBERS or x.dim() < 2 or not without_a_mask(x):
            continue
        if probs is not None and (probs.dim() < 2 or probs.triu(1).any()):
            continue  # there was none
        later = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        theirs[name] = x.masked_fill(later, -torch.inf)
        found.add(name)
    return found


def check_numbers(source: str, theirs: Tensors, known: list[str]) -> None:
    """ValueError unless the tensors that are to be compared are plain finite numbers (of scores -inf too)."""
    for name in known:
        x = theirs[name]
        if x.dtype not in NUMBERS or not 0 < x.numel() <= LARGEST:
            raise ValueError(
                f"{source}: {name} is {x.dtype} {tuple(x.shape)}; real numbers are expected"
            )
        bad = x.isnan() | (x.isinf() & (not name.endswith("scores")))
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(f"{source}: {name} holds {x[tuple(place)]} at {place}")


# ------------------------------------------------------------------------------------ layouts


def width_of(name: str, params: Params) -> int:
    """How many numbers does a position have in a tensor? 0 where its shape is needed to tell."""
    part = re.sub(r"^layers\.\d+\.", "", name)
    widths = {
        "attention.q": "HE",
        "attention.q_rotated": "HE",
        "attention.heads": "HE",
        "logits": "V",
    }
    widths |= {f"feed_forward.{it}": "F" for it in ("gate", "up", "hidden")}
    widths |= dict.fromkeys(("attention.scores", "attention.probs"), "")
    widths |= {f"attention.{it}": "" for it in ("k", "k_rotated", "v")}  # repeated, or not?
    sizes = {"D": params["dim"], "F": params["ffn_dim"], "V": params["vocab_size"], "": 0}
    sizes["HE"] = params["n_heads"] * params["head_dim"]
    return sizes[widths.get(part, "D")]


def positions_in(theirs: Tensors, params: Params) -> int:
    """How many positions do the tensors of a dump have? The fewest that one has; 0 where nothing tells."""
    lengths = set()
    for name in traced_names(params):
        width = width_of(name, params)
        if name not in theirs or not width:
            continue
        shape = tuple(theirs[name].shape)
        per_head = name.endswith(("q", "q_rotated", "heads")) and params["head_dim"] in shape
        if shape[-1:] != (width,) and not per_head:
            continue
        positions = theirs[name].numel() // width
        if positions and not (positions == 1 and name in ("norm", "logits")):
            lengths.add(positions)
    return min(lengths, default=0)


def readings(name: str, theirs: Tensor, shape: tuple[int, ...], G: int) -> list[Reading]:
    """The ways in which a tensor can be read as one of a shape of the script's; none if it is another's.

    Of norm and logits the last position alone is enough.
    """
    read: list[tuple[tuple[str, ...], Tensor]] = [((), theirs)]
    square = name.endswith(("scores", "probs"))
    T = shape[-2]
    last = (*shape[:-2], 1, shape[-1])

    def also(words: str, change: Callable[[Tensor], Tensor | None]) -> None:
        for said, x in list(read):
            try:
                result = change(x)
            except (RuntimeError, IndexError, ValueError):
                continue  # it cannot be read so
            if result is not None:
                read.append(((*said, words), result))

    def in_groups(x: Tensor) -> bool:
        """Is x (K G T S) of the size of (1 H T S)?"""
        return x.dim() == 4 == len(shape) and x.shape[1] < shape[1] == x.shape[0] * x.shape[1]

    also(
        "without a batch axis", lambda x: x[None] if x.dim() < len(shape) or in_groups(x) else None
    )
    if len(shape) == 4 and square:
        also("heads in groups", lambda x: x.flatten(1, 2) if x.dim() == 5 else None)
        also(
            "with slots to spare",
            lambda x: x[..., :T] if x.dim() == 4 and x.shape[-1] > T else None,
        )
    elif len(shape) == 4:
        H, E = shape[1], shape[3]
        for n in sorted({H, H * G}):
            also(
                "heads side by side",
                lambda x, n=n: (
                    x.unflatten(-1, (n, E)).transpose(1, 2) if x.shape[-1] == n * E != E else None
                ),
            )
        also("positions before heads", lambda x: x.transpose(1, 2) if x.dim() == 4 else None)
        also("grouped", lambda x: x.flatten(1, 2) if x.dim() == 5 else None)
        if G > 1 and name.endswith(("k", "v", "k_rotated")):
            also(
                "repeated for each query head",
                lambda x: x[:, ::G] if x.shape[1] == H * G and same_in_groups(x, G) else None,
            )
        if name.endswith(("q", "k", "_rotated")):
            also(HALVES, to_pairs)
    also(
        f"the first {T} positions",
        lambda x: x[..., :T, :] if x.dim() == len(shape) and x.shape[-2] > T else None,
    )
    if name in ("norm", "logits"):
        also("of the last position only", lambda x: x if x.shape == last != shape else None)
        also("of the last position only", lambda x: x[:, None] if x.dim() == 2 else None)
    wanted = (shape, last) if name in ("norm", "logits") else (shape,)
    return [
        (", ".join(said), x)
        for said, x in read
        if x.shape == shape or x.shape in wanted and "last" in "".join(said)
    ]


HALVES = "half-split pairs"


def same_in_groups(x: Tensor, G: int) -> bool:
    x = x.unflatten(1, (-1, G))
    return torch.equal(x, x[:, :, :1].expand_as(x))
