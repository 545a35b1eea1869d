"""GGUF, the files of llama.cpp: what their header says, their tensors and their tokenizer.

The header is read here and not by the library `gguf`, which believes every length and makes several objects
for each token (5 s and 160 MB for a vocabulary of 49,152). How quantized blocks become numbers again is the
library's affair. llama.cpp's converter has already brought wq and wk into Meta's order of rows.
"""

import functools
import importlib
import math
import mmap
import re
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama3_from_scratch import Params, Weights
from parts import config, layouts, printable

Header = dict[str, Any]  # "version", "fields" (by key), "tensors" (by name), "start" of their data
Opened = dict[
    str, Any
]  # "file", its "size" and "path", how many "strings" of lists it may still have
Entry = tuple[
    str, tuple[int, ...], int, int
]  # of a tensor: file, shape, type, where its data starts

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
LITTLE_ENDIAN = {code: struct.Struct("<" + code) for code in NUMBERS.values()}
STRING, ARRAY = 8, 9
F32, F16, BF16 = 0, 1, 30
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
MOST = {"fields": 2**16, "tensors": 2**16, "strings": 2**23}  # far above what real files have
KEPT = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")  # of the lists of strings
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

NAMES = {  # llama.cpp's: Meta's; each followed by ".weight"
    "token_embd": "tok_embeddings",
    "blk.{}.attn_norm": "layers.{}.attention_norm",
    "blk.{}.attn_q": "layers.{}.attention.wq",
    "blk.{}.attn_k": "layers.{}.attention.wk",
    "blk.{}.attn_v": "layers.{}.attention.wv",
    "blk.{}.attn_output": "layers.{}.attention.wo",
    "blk.{}.ffn_norm": "layers.{}.ffn_norm",
    "blk.{}.ffn_gate": "layers.{}.feed_forward.w1",
    "blk.{}.ffn_up": "layers.{}.feed_forward.w3",
    "blk.{}.ffn_down": "layers.{}.feed_forward.w2",
    "output_norm": "norm",
    "output": "output",
}


def library(path: Path) -> Any:
    """The package gguf. ValueError, in one line, where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ValueError(
            f"{path}: a GGUF file, which takes a package more; pip install gguf"
        ) from None


# ------------------------------------------------------------------------------------------- the header


def read_header(path: Path) -> Header:
    """What stands before the tensors' data. ValueError for a length or count that the file cannot hold.

    Lists of strings are kept for the tokenizer only, lists of numbers stay bytes (see numbers_of).
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        opened: Opened = {"file": file, "size": size, "path": path, "strings": MOST["strings"]}
        n_tensors, n_fields = _counts(opened)
        fields = _fields(opened, n_fields)
        tensors = _tensors(opened, n_tensors)
        end = file.tell()
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        found = repr(alignment)[:40]
        raise _wrong(opened, f"general.alignment is {found}, expected a power of two from 8")
    start = math.ceil(end / alignment) * alignment
    for name, (_, shape, kind, offset) in tensors.items():
        if offset % alignment:
            raise ValueError(
                f"{path}: {printable(name)} starts at byte {offset} of the data, which is not a multiple of "
                f"{alignment}"
            )
        tensors[name] = (str(path), shape, kind, start + offset)
    return {"fields": fields, "tensors": tensors, "start": start, "alignment": alignment}


def _wrong(opened: Opened, what: str) -> ValueError:
    """An error that says what is wrong with this file."""
    return layouts.explain(opened["path"], "a GGUF file", what)


def _take(opened: Opened, count: int, what: str) -> bytes:
    """The next bytes, if the file has so many."""
    file, size = opened["file"], opened["size"]
    if count > size - file.tell():
        raise _wrong(
            opened,
            f"{what} of {count:,} bytes at byte {file.tell():,}, but the file has {size:,} bytes",
        )
    data: bytes = file.read(count)
    return data


def _number(opened: Opened, code: str, what: str) -> Any:
    """The next number, of the type that `struct` has under this letter."""
    plain = LITTLE_ENDIAN[code]
    return plain.unpack(_take(opened, plain.size, what))[0]


def _string(opened: Opened, what: str) -> str:
    """The next text: its length, then its bytes."""
    length = _number(opened, "Q", what)
    data = _take(opened, length, what)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        place = opened["file"].tell()
        raise _wrong(opened, f"{what} at byte {place:,} is not UTF-8") from None


def _list(opened: Opened, what: str) -> Any:
    """The next list: numbers as their type and bytes; strings, or how many there are of those not kept."""
    kind, count = _number(opened, "I", what), _number(opened, "Q", what)
    if kind in NUMBERS:
        code = NUMBERS[kind]
        return code, _take(opened, count * LITTLE_ENDIAN[code].size, what)
    if kind != STRING:
        raise _wrong(opened, f"{what} is a list of type {kind}, which a GGUF file cannot hold")
    opened["strings"] -= count
    if opened["strings"] < 0 or 8 * count > opened["size"] - opened["file"].tell():
        raise _wrong(opened, f"{what} is a list of {count:,} strings, more than can be here")
    if what in KEPT:
        return [_string(opened, what) for _ in range(count)]
    for _ in range(count):
        _take(opened, _number(opened, "Q", what), what)
    return count


def _counts(opened: Opened) -> tuple[int, int]:
    """How many tensors and fields the file says that it has, from its first bytes."""
    path = opened["path"]
    if _take(opened, min(4, opened["size"]), "the first word") != b"GGUF":
        raise _wrong(opened, "it does not start with GGUF")
    version = _number(opened, "I", "the version")
    if version & 0xFFFF == 0 and version:
        raise ValueError(
            f"{path}: a big-endian GGUF file, which is not supported; convert it with "
            "gguf-convert-endian (of the package gguf)"
        )
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version} is not supported, only 2 and 3")
    n_tensors = _number(opened, "Q", "the counts")
    n_fields = _number(opened, "Q", "the counts")
    for what, count in (("tensors", n_tensors), ("fields", n_fields)):
        if count > MOST[what]:
            raise _wrong(opened, f"it claims to have {count:,} {what}")
    return n_tensors, n_fields


def _fields(opened: Opened, count: int) -> dict[str, Any]:
    """The metadata by key."""
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = _string(opened, "a key")
        shown = printable(key)
        if key in fields:
            raise _wrong(opened, f"the key {shown} is there twice")
        kind = _number(opened, "I", shown)
        if kind in NUMBERS:
            fields[key] = _number(opened, NUMBERS[kind], shown)
        elif kind == STRING:
            fields[key] = _string(opened, shown)
        elif kind == ARRAY:
            fields[key] = _list(opened, shown)
        else:
            raise _wrong(opened, f"{shown} has the type {kind}, which a GGUF file cannot hold")
    return fields


def _tensors(opened: Opened, count: int) -> dict[str, Entry]:
    """The tensors by name; their places are still offsets."""
    tensors: dict[str, Entry] = {}
    for _ in range(count):
        name = _string(opened, "a tensor's name")
        shown = printable(name)
        if name in tensors:
            raise _wrong(opened, f"the tensor {shown} is there twice")
        n_dims = _number(opened, "I", shown)
        if not 1 <= n_dims <= 4:
            raise _wrong(opened, f"the tensor {shown} has {n_dims} dimensions")
        shape = tuple(_number(opened, "Q", shown) for _ in range(n_dims))[::-1]  # the last is first
        tensors[name] = ("", shape, _number(opened, "I", shown), _number(opened, "Q", shown))
    return tensors


def numbers_of(fields: dict[str, Any], key: str) -> list[Any] | None:
    """A list of numbers of the metadata; None if there is none."""
    value = fields.get(key)
    if not isinstance(value, tuple):
        return None
    code, data = value
    return [number for (number,) in struct.iter_unpack("<" + code, data)]


def is_first(path: Path) -> bool:
    """Is this a whole model, or the first of its parts?"""
    match = SPLIT.fullmatch(path.name)
    return match is None or int(match[2]) == 1


def files_of(path: Path) -> list[Path]:
    """All files of a model from one of them: split ones are called …-00001-of-00003.gguf."""
    match = SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    if not 1 <= int(match[2]) <= int(count) <= 1000:
        raise ValueError(f"{path}: a part of a split model, but its name makes no sense")
    files = [path.with_name(f"{stem}-{n:05}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file, but {path.name} is one of {int(count)} parts; is the download "
                "complete?"
            )
    return files


def read_headers(files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata (of the first file) and the tensors of all. ValueError if they do not belong together."""
    headers = [read_header(path) for path in files]
    fields: dict[str, Any] = headers[0]["fields"]
    tensors: dict[str, Entry] = {}
    count = fields.get("split.count", 1) or 1
    for n, (path, header) in enumerate(zip(files, headers)):
        place = header["fields"].get("split.no", 0), header["fields"].get("split.count", 1) or 1
        if place != (n, len(files)):
            raise ValueError(
                f"{path}: expected part {n + 1} of {len(files)}, found part {place[0] + 1} of {place[1]}; "
                "split files go by their names, …-00001-of-00003.gguf"
            )
        twice = header["tensors"].keys() & tensors.keys()
        if twice:
            raise ValueError(f"{path}: {printable(min(twice))} is in another part too")
        tensors |= header["tensors"]
    expected = fields.get("split.tensors.count")
    if count > 1 and expected not in (None, len(tensors)):
        raise ValueError(
            f"{files[0]}: the parts have {len(tensors)} tensors together, {expected} were announced; they "
            "are of different models"
        )
    return fields, tensors


# ------------------------------------------------------------------------------------------ the tensors


def bytes_of_row(gguf: Any, name: str, entry: Entry) -> int:
    """How long a row of a tensor is in its file. ValueError for a type that cannot be read."""
    file, shape, kind, _ = entry
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
        if kind not in PLAIN:
            gguf.dequantize(_zeros(size), known)
    except (ValueError, KeyError, NotImplementedError):
        what = getattr(_kind(gguf, kind), "name", kind)
        raise ValueError(
            f"{file}: {printable(name)} is of the type {what}, which the library gguf cannot turn into "
            "numbers; take another quantization"
        ) from None
    if shape[-1] % block or not math.prod(shape):
        raise ValueError(
            f"{file}: {printable(name)} has the shape {shape}, which is not made of {known.name} blocks of "
            f"{block}"
        )
    return shape[-1] // block * size


def _kind(gguf: Any, kind: int) -> Any:
    """The library's name for a type of numbers; None if it knows none."""
    try:
        return gguf.GGMLQuantizationType(kind)
    except ValueError:
        return None


@functools.cache
def _zeros(size: int) -> Any:
    """One block of zero bytes, as numpy's array."""
    return torch.zeros(1, size, dtype=torch.uint8).numpy()


def check_places(gguf: Any, tensors: dict[str, Entry]) -> None:
    """ValueError unless each tensor lies within its file, and no two on each other."""
    ends: dict[str, tuple[int, str]] = {}
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][3]):
        file, shape, _, start = entry
        end = start + math.prod(shape[:-1]) * bytes_of_row(gguf, name, entry)
        size = Path(file).stat().st_size
        if end > size:
            raise ValueError(
                f"{file}: {printable(name)} would end at byte {end:,}, but the file has {size:,} bytes; it "
                "was cut short, or is damaged"
            )
        before, other = ends.get(file, (0, ""))
        if start < before:
            raise ValueError(
                f"{file}: {printable(name)} and {printable(other)} lie on each other; it is damaged"
            )
        ends[file] = end, name


def metas_name(name: str) -> str | None:
    """A tensor's name in Meta's layout. None: a Llama has no such tensor."""
    layer = re.match(r"blk\.(\d+)\.", name)
    pattern = name.removesuffix(".weight")
    if layer:
        pattern = pattern.replace(layer[1], "{}", 1)
    known = NAMES.get(pattern) if name.endswith(".weight") else None
    return f"{known.format(layer and layer[1])}.weight" if known else None


def mapped(file: str) -> Tensor:
    """All bytes of a file, mapped: a page is read when it is used, and a write stays in memory."""
    with open(file, "rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=torch.uint8)


def reader(gguf: Any, tensors: dict[str, Entry]) -> Callable[..., Tensor]:
    """A function that gives a tensor's numbers, by Meta's name: (name, tensor on "meta", rows).

    F32, F16 and BF16 stay on the mapped file; others are turned into float32, some rows at a time. The
    tensor on "meta" only says that nothing is read yet.
    """
    by_name = {
        metas_name(name) or name: (entry, bytes_of_row(gguf, name, entry))
        for name, entry in tensors.items()
    }
    maps = {file: mapped(file) for file in {entry[0] for entry in tensors.values()}}
    slab = 2**20  # numbers at once

    def read(name: str, w: Tensor, rows: slice = slice(None)) -> Tensor:
        if not w.is_meta:  # the head is the embedding, which was read before
            return w
        (file, shape, kind, start), row = by_name[name]
        count = math.prod(shape[:-1])
        data = maps[file][start : start + count * row].view(count, row)[rows]
        whole = (len(data), *shape[1:]) if len(shape) > 1 else shape
        if kind in PLAIN:
            return data.contiguous().view(PLAIN[kind]).view(whole)
        numbers = torch.empty(len(data), shape[-1])
        step = max(16, slab // shape[-1])

        def fill(n: int) -> None:
            part = gguf.dequantize(data[n : n + step].numpy(), gguf.GGMLQuantizationType(kind))
            numbers[n : n + step] = torch.from_numpy(part)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, len(data), step)))
        return numbers.view(whole)

    return read


# ------------------------------------------------------------------------------------------- the params

PARAMS = {  # Meta's: llama.cpp's, each after "llama."
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_seq_len": "context_length",
}
HARMLESS: dict[
    str, tuple[Any, ...] | None
] = {  # what they may say without changing the arithmetic; None: anything; of others, config knows
    "vocab_size": None,
    "tensor_data_layout": None,
    "rope.scaling.original_context_length": None,
    "rope.scaling.finetuned": None,
    "rope.scaling.attn_factor": (1.0,),
}
SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.dimension_count")


def check_architecture(fields: dict[str, Any], path: Path) -> None:
    """ValueError if this is not a Llama, or not a model."""
    architecture, kind = fields.get("general.architecture"), fields.get("general.type", "model")
    if architecture != "llama" or kind != "model":
        found = architecture if architecture != "llama" else f"{architecture}, {kind}"
        raise ValueError(
            f"{path}: its architecture is {printable(str(found))[:60]}; only llama, a whole model, is "
            "supported"
        )


def params_of(fields: dict[str, Any], path: Path, rope_factors: Tensor | None, V: int) -> Params:
    """Params from the metadata. rope_factors: rope_freqs.weight, by which each pair is slowed down."""
    said = {key[6:]: value for key, value in fields.items() if key.startswith("llama.")}
    E = said.get("attention.key_length", said.get("rope.dimension_count"))
    said.setdefault("attention.key_length", E)
    harmless: dict[str, tuple[Any, ...] | None] = dict(HARMLESS)
    harmless["attention.value_length"] = harmless["rope.dimension_count"] = (
        said["attention.key_length"],
    )
    read = {*PARAMS.values(), *SCALING} - harmless.keys()
    window, context = said.get("attention.sliding_window"), said.get("context_length")
    if window == 0 or (type(window) is type(context) is int and window >= context):
        harmless["attention.sliding_window"] = None
    for key, value in said.items():
        allowed = harmless.get(key)
        if key in harmless and (allowed is None or value in allowed):
            continue
        if key not in {*harmless, *read} and config.says_off(key.rpartition(".")[2], value):
            continue
        if key not in read:
            raise ValueError(
                f"{path}: llama.{printable(key)} is {printable(repr(value))[:40]}, which is not supported: "
                "it makes this another kind of model"
            )
        if isinstance(value, tuple):
            raise ValueError(
                f"{path}: llama.{key} differs from layer to layer, which is not supported"
            )
    given = {ours: said[key] for ours, key in PARAMS.items() if said.get(key) is not None}
    given["vocab_size"] = V
    given.setdefault("rope_theta", 10000.0)
    names = {ours: f"llama.{key}" for ours, key in PARAMS.items()}
    for ours in ("ffn_dim", "norm_eps", "max_seq_len"):
        if ours not in given:
            raise ValueError(f"{path}: {names[ours]} is missing from its metadata")
    params = layouts.check_params(given, path, names)
    scaling = rope_scaling(said, params, rope_factors, path)
    return layouts.check_params(given | scaling, path, names) if scaling else params


def rope_scaling(
    said: dict[str, Any], params: Params, rope_factors: Tensor | None, path: Path
) -> Params:
    """How RoPE is scaled, in Meta's params: nothing, evenly (linear), or as in Llama 3.1."""
    kind = said.get("rope.scaling.type", "linear")
    factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1.0
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{path}: llama.rope.scaling.type is {printable(repr(kind))[:40]}, which is not supported, only "
            "'linear', and Llama 3.1's scaling in rope_freqs.weight"
        )
    if type(factor) not in (int, float) or not factor >= 1:
        raise ValueError(
            f"{path}: llama.rope.scaling.factor is {repr(factor)[:40]}, expected a number from 1"
        )
    factors = torch.full((params["head_dim"] // 2,), float(factor if kind == "linear" else 1.0))
    if rope_factors is not None:
        if factors[0] != 1:
            raise ValueError(
                f"{path}: it has rope_freqs.weight and llama.rope.scaling.factor {factor:g}, which "
                "contradict each other"
            )
        if rope_factors.shape != factors.shape or not (rope_factors >= 1 - 1e-5).all():
            raise ValueError(
                f"{path}: rope_freqs.weight: expected {len(factors)} numbers from 1, found shape "
                f"{tuple(rope_factors.shape)}, from {rope_factors.min():g} to {rope_factors.max():g}"
            )
        factors = rope_factors
    found = scaling_of(factors.double(), params)
    if found is None:
        raise ValueError(
            f"{path}: rope_freqs.weight is not how Llama 3.1 scales RoPE, which is not supported"
        )
    if found:
        found["rope_scaling_from"] = "rope_freqs.weight" if rope_factors is not None else "linear"
    return found


def slowed_by(scaling: Params, freqs: Tensor) -> Tensor:
    """By what each pair's frequency is divided, as in the script's rope_turns."""
    low, high = scaling["rope_low_freq_factor"], scaling["rope_high_freq_factor"]
    turns = scaling["rope_original_context"] * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - keep) / scaling["rope_scaling_factor"] + keep)


def scaling_of(factors: Tensor, params: Params) -> Params | None:
    """The RoPE scaling that divides the pairs' frequencies by these factors; {} for none, None if no such.

    Llama 3.1 keeps fast pairs, divides slow ones by the last factor, and goes evenly from one to the other:
    how much is kept is a line over the frequency, cut at 0 and 1.
    """
    E, factor = params["head_dim"], factors[-1].item()
    if (factors - 1).abs().max() < 1e-5:
        return {}
    freqs = params["rope_theta"] ** -(torch.arange(0, E, 2).double() / E)
    scaling = {
        "use_scaled_rope": True,
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_context": 8192,
    }

    def fits() -> bool:
        return bool(((slowed_by(scaling, freqs) / factors - 1).abs() < 1e-4).all())

    if fits():
        return scaling
    if (factors - factor).abs().max() < 1e-5 * factor:  # no pair turns once in a context of 1
        return scaling | {"rope_original_context": 1}
    keep = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (keep > 1e-4) & (keep < 1 - 1e-4)
    if between.sum() >= 2:
        x, y = freqs[between], keep[between]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).pow(2).sum()
        start = y.mean() - slope * x.mean()
    else:  # any line will do that passes through the one point, and is cut before its neighbours
        slow = freqs[keep <= 1e-4][0]
        fast = freqs[keep >= 1 - 1e-4][-1:].min() if (keep >= 1 - 1e-4).any() else 2 * freqs[0]
        x = freqs[between][0] if between.any() else (slow * fast).sqrt()
        y = keep[between][0] if between.any() else torch.tensor(0.5)
        slope = torch.maximum(y / (x - slow), (1 - y) / (fast - x))
        start = y - slope * x
    for context in (8192, 512):  # which of them says nothing of its own: factors go with it
        width = context / (2 * math.pi * slope.item())
        scaling["rope_original_context"] = context
        scaling["rope_low_freq_factor"] = -start.item() * width
        scaling["rope_high_freq_factor"] = (1 - start.item()) * width
        if scaling["rope_high_freq_factor"] <= 1000:
            break
    return scaling if scaling["rope_low_freq_factor"] > 0 and fits() else None


# ---------------------------------------------------------------------------------------- the tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of tokens; 6 is a byte
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
CUTS = {  # names of tokenizer.ggml.pre: how tokenizer.json says the same, and its ignore_merges
    "llama3 llama-v3 llama-bpe falcon3 pixtral": (["llama-3"], True),
    "dbrx smaug-bpe": (["llama-3"], False),
    "smollm starcoder refact command-r codeshell": (["digits", "gpt-2"], False),
    "gpt-2 phi-2 mpt olmo jais": (["gpt-2"], False),
}


def pre_tokenizer(steps: Sequence[str]) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json: "digits" one by one, "gpt-2" or "llama-3"."""
    from parts import vocabulary

    made: list[dict[str, Any]] = []
    for step in steps:
        if step == "digits":
            made.append({"type": "Digits", "individual_digits": True})
        elif step == "gpt-2":
            made.append(BYTE_LEVEL)
        else:
            pattern = {"Regex": vocabulary.llama_3_pattern()}
            cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated"}
            made += [cut | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """SentencePiece keeps a score for each token: of two neighbours, those of the best whole are joined."""
    ids = {token: n for n, token in enumerate(tokens)}
    found = []
    for whole, score in zip(tokens, scores):
        for n in range(1, len(whole)):
            left, right = whole[:n], whole[n:]
            if left in ids and right in ids:
                found.append((-score, ids[whole], ids[left], ids[right], left, right))
    found.sort()
    return [[left, right] for *_, left, right in found]


def tokenizer_of(
    fields: dict[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """What tokenizer.json and tokenizer_config.json would say, and the tokens that end a text."""
    model, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens) or not tokens:
        found = "missing" if not isinstance(tokens, list) else "holding a token twice, or none"
        raise ValueError(f"{path}: tokenizer.ggml.tokens is {found}")
    types = numbers_of(fields, "tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(
            f"{path}: {len(tokens)} tokens, but tokenizer.ggml.token_type has {len(types)} entries"
        )
    if model == "gpt2":
        made = byte_level(fields, tokens, path)
    elif model == "llama":
        made = sentencepiece_like(fields, tokens, path)
    else:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {printable(repr(model))[:40]}, which is not supported, only "
            "'gpt2' and 'llama'"
        )
    added = [n for n, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
    usual = max({*range(len(tokens))} - {*added}, default=-1)
    # What the converter calls the rows that are no token's.
    spare = {n for n, token in enumerate(tokens) if types[n] == UNUSED and token == f"[PAD{n}]"}
    usual_ids = [n for n in range(usual + 1) if n not in spare]
    made["model"]["vocab"] = {tokens[n]: n for n in usual_ids}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    made["added_tokens"] = [
        {"id": n, "content": tokens[n], **plain, "special": types[n] != USER_DEFINED} for n in added
    ]

    def token(key: str) -> int | None:
        n = fields.get(f"tokenizer.ggml.{key}_token_id")
        if n is None or n == 0xFFFFFFFF:
            return None
        if type(n) is not int or not 0 <= n < len(tokens):
            raise ValueError(
                f"{path}: tokenizer.ggml.{key}_token_id is {repr(n)[:40]}, expected one of {len(tokens)} "
                "tokens"
            )
        return n

    settings: dict[str, Any] = {
        "add_bos_token": fields.get(
            "tokenizer.ggml.add_bos_token", model == "llama" or made["model"]["ignore_merges"]
        ),
        "add_eos_token": fields.get("tokenizer.ggml.add_eos_token", False),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        n = token(theirs)
        if n is not None:
            settings[f"{ours}_token"] = tokens[n]
    ends = {token(key) for key in ("eos", "eot", "eom")} - {None}
    names = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")  # Llama 3's
    ends |= {n for n in added if types[n] == CONTROL and tokens[n] in names}
    return made, settings, sorted(n for n in ends if n is not None)


def byte_level(fields: dict[str, Any], tokens: list[str], path: Path) -> dict[str, Any]:
    """A tokenizer.json without its tokens, of a byte-level BPE."""
    pre, merges = fields.get("tokenizer.ggml.pre"), fields.get("tokenizer.ggml.merges")
    known = {name: how for names, how in CUTS.items() for name in names.split()}
    if pre == "default":  # llama.cpp then cuts in a fourth way, a guess
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is 'default': its converter did not know how the model cuts a text; "
            "convert the model anew, with a newer convert_hf_to_gguf.py, which says its real name"
        )
    if pre not in known:
        found = "missing" if pre is None else printable(repr(pre))[:40]
        raise ValueError(
            f"{path}: tokenizer.ggml.pre, how a text is cut before its bytes are joined, is {found}; known "
            f"are {', '.join(known)}"
        )
    pairs = [merge.split(" ", 1) for merge in merges or ()]
    ids = {*tokens}
    for n, pair in enumerate(pairs):
        if len(pair) != 2 or not ids.issuperset((*pair, "".join(pair))):
            raise ValueError(f"{path}: tokenizer.ggml.merges: number {n} does not join two tokens")
    steps, ignore_merges = known[pre]
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(steps),
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "merges": pairs,
        },
    }


def sentencepiece_like(fields: dict[str, Any], tokens: list[str], path: Path) -> dict[str, Any]:
    """A tokenizer.json without its tokens, of a BPE as Llama 2's: with scores, and tokens for bytes."""
    scores = numbers_of(fields, "tokenizer.ggml.scores") or []
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"{path}: {len(tokens)} tokens, but tokenizer.ggml.scores has {len(scores)} finite numbers"
        )
    if max(map(len, tokens)) > 10_000:
        raise ValueError(f"{path}: tokenizer.ggml.tokens has one of over 10,000 characters")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    before = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
    after = [strip] if prefix else []
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
        "model": {
            "type": "BPE",
            "unk_token": tokens[unknown]
            if type(unknown) is int and unknown < len(tokens)
            else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": merges_from_scores(tokens, scores),
        },
    }


# ------------------------------------------------------------------------------------------- all of it


def open_gguf(path: Path) -> layouts.Opened:
    """A GGUF file, or all parts of one. Tensors are on "meta" until load_weights asks for each."""
    gguf = library(path)
    files = files_of(path)
    fields, tensors = read_headers(files)
    check_architecture(fields, files[0])
    rope = tensors.pop("rope_freqs.weight", None)
    for name in [name for name in tensors if name.endswith(".attn_rot_embd.weight")]:
        del tensors[name]  # old files' table of RoPE; the script computes it
    check_places(gguf, tensors if rope is None else tensors | {"rope_freqs.weight": rope})
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: token_embd.weight is missing; it holds no whole model")
    rope_factors = None
    if rope is not None:
        read = reader(gguf, {"rope_freqs.weight": rope})
        rope_factors = read("rope_freqs.weight", torch.empty(1, device="meta")).float()
    V = tensors["token_embd.weight"][1][0]
    params = params_of(fields, files[0], rope_factors, V)
    # float32 stays; what has 16 bits or fewer a number becomes bfloat16, unless --dtype says otherwise.
    matrices = {kind for _, shape, kind, _ in tensors.values() if len(shape) > 1}
    dtype = torch.float32 if matrices == {F32} else torch.bfloat16
    shard: Weights = {}
    for name, (file, shape, _, _) in tensors.items():
        known = metas_name(name)
        if known is None:
            raise ValueError(
                f"{file}: {printable(name)[:80]}: a Llama has no such tensor; it is of another kind of "
                "model, or damaged"
            )
        shard[known] = torch.empty(shape, dtype=dtype, device="meta")
    kinds = sorted(gguf.GGMLQuantizationType(kind).name for kind in matrices)
    words = f"GGUF, {len(files)} file{'s' * (len(files) > 1)}, {', '.join(kinds)}"
    return (
        params,
        {path.name: shard},
        tokenizer_from(fields, files[0]),
        reader(gguf, tensors),
        words,
    )


def tokenizer_from(fields: dict[str, Any], path: Path) -> Any:
    """The tokenizer of the metadata."""
    from parts import vocabulary

    return vocabulary.from_json(*tokenizer_of(fields, path), path)
