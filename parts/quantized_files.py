"""Folders of weights in 8 or 4 bits, as tools/quantize.py writes them and --weights maps them from disk.

quantized.safetensors holds each tensor under Meta's name: norms as they were, each matrix (F D) as the
tensor that parts/quantized.py makes of it, numbers first, then scales. So a CPU computes on the mapped file,
and nothing is copied. Beside it lie params.json and the tokenizer's own files. docs/quantization.md has the
format byte by byte.

Numbers of 4 bits stand in words, or in the order that PyTorch's product wants on the CPU that wrote them. The
metadata name that order; another CPU or a GPU puts them into its own.
"""

import ctypes
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import config, layouts, printable, quantized, vocabulary
from parts.files import openable

NAME = "quantized.safetensors"
FORMAT, VERSION = "llama3_from_scratch.quantized", "3"
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}
AGAIN = "make it again with tools/quantize.py"
USE = (  # what tells how a tokenizer is used, beside its own file
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_templates",
)


# ------------------------------------------------------------------------------------ the order of numbers


def placed4(w: Tensor, order: str) -> Tensor:
    """A matrix in 4 bits from a file of this order, as the device that it is on computes with it."""
    kernel = quantized.has_kernel(w)
    if (w.dtype == torch.uint8) == kernel and (not kernel or order == quantized.order_here()):
        return w
    F, D = len(w), quantized.width_of(w)
    if w.dtype == torch.uint8:
        halves, beside = quantized.split(w)
        how = quantized.ORDERS[order]
        numbers = quantized.out_of_blocks(halves.flatten(), F, D, *how).to(torch.int8) - 8
        scales, zeros = beside.permute(2, 1, 0)
    else:
        numbers, scales, zeros = quantized.unpacked(w)
    one = quantized.empty("int4", (F, D), w.device, kernel)
    quantized.put(one, slice(None), numbers, scales, zeros)
    return one


def dequantized(weights: llama.Weights) -> llama.Weights:
    """A model's weights with plain matrices, in float32, in place of those in 8 or 4 bits."""
    made = {
        w.data_ptr(): quantized.dequantized(w) if quantized.is_quantized(w) else w
        for w in weights.values()
    }  # a tied head only once
    return {name: made[w.data_ptr()] for name, w in weights.items()}


# ------------------------------------------------------------------------------------ reading


def open_quantized(path: Path) -> layouts.Opened:
    """A folder that tools/quantize.py has written, by its file of weights: all of it is checked."""
    tensors = layouts.open_safetensors(path)
    about = about_file(path)
    tokenizer = tokenizer_of(path.parent)
    params = layouts.metas_params(path.parent / "params.json", tokenizer)
    check(tensors, params, about, path)
    kind = about["kind"]

    def placed(name: str, w: Tensor) -> Tensor:
        return placed4(w, about["order"]) if w.dtype in (torch.uint8, torch.int32) else w

    vars(placed)["saved"] = {"kind": kind, "dtype": getattr(torch, about["dtype"])}
    return params, {path.name: tensors}, tokenizer, placed, f"weights saved in {kind}"


def about_file(path: Path) -> dict[str, Any]:
    """The metadata of a file of quantized weights. ValueError for what is not known here."""
    with openable(path) as name, safetensors.safe_open(name, "pt") as file:
        about = file.metadata() or {}
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path}: its metadata do not say that it is of the format {FORMAT}, as those of "
            "tools/quantize.py do; another program's file takes another name"
        )
    known = {
        "version": (VERSION,),
        "kind": quantized.KINDS,
        "group": (str(quantized.GROUP),),
        "order": (*quantized.ORDERS, "words"),
        "dtype": tuple(str(dtype).removeprefix("torch.") for dtype in llama.FLOATS),
    }
    for key, words in known.items():
        if about.get(key) not in words:
            found = f"is {config.shown(about[key])}" if key in about else "is missing"
            raise ValueError(
                f"{path}: {key} in its metadata {found}, expected {' or '.join(words)}; {AGAIN}"
            )
    try:
        forms = json.loads(about.get("forms", ""))
    except (ValueError, RecursionError):
        forms = None
    if not isinstance(forms, dict):
        raise ValueError(f"{path}: forms in its metadata is no JSON object; {AGAIN}")
    return about | {"forms": forms}


def check(tensors: llama.Weights, params: llama.Params, about: dict[str, Any], path: Path) -> None:
    """ValueError unless each tensor is there, in the form that the metadata name, with finite scales."""
    shapes = llama.weight_shapes(params)
    if "output.weight" not in tensors and "output.weight" not in about["forms"]:
        del shapes["output.weight"]  # the head is the embedding
    for name in [*tensors, *about["forms"]]:
        if name not in shapes:
            raise ValueError(
                f"{path}: {printable(name, 80)}: a Llama of these sizes has no such tensor"
            )
    for name, shape in shapes.items():
        w, form = tensors.get(name), about["forms"].get(name, "")
        if w is None:
            raise ValueError(
                f"{path}: {name} is missing; params.json is another model's, or the file is damaged; {AGAIN}"
            )
        into = quantized.kind_of(about["kind"], name, shape)
        if not into:
            if form or w.dtype not in llama.FLOATS or tuple(w.shape) != shape:
                raise ValueError(
                    f"{path}: {name}: expected plain numbers {shape}, found {said(w)}; {AGAIN}"
                )
        else:
            check_matrix(name, w, form, into, shape, about["order"], path)


def said(w: Tensor) -> str:
    """Words for what a file holds: "int8 (64, 66)"."""
    return f"{str(w.dtype).removeprefix('torch.')} {tuple(w.shape)}"


def in_four(F: int, order: str) -> torch.dtype:
    """The dtype of a matrix of F rows in 4 bits in a file: PyTorch's kernel takes a multiple of 16 rows."""
    return torch.int32 if F % 16 or order == "words" else torch.uint8


def check_matrix(
    name: str,
    w: Tensor,
    form: object,
    into: str,
    shape: tuple[int, ...],
    order: str,
    path: Path,
) -> None:
    """ValueError unless these are the bytes of a matrix of this shape in the form it should have: into."""
    F, D = shape
    if form != into:
        raise ValueError(
            f"{path}: the form of {name} {shape} in the metadata is {config.shown(form)}, which cannot be; "
            f"{AGAIN}"
        )
    dtype = torch.int8 if into == "int8" else in_four(F, order)
    expected = (F, quantized.bytes_of(into, (F, D)) // F // dtype.itemsize)
    if w.dtype != dtype or tuple(w.shape) != expected:
        alone = tuple(w.shape) in ((F, D), (F, D // 2))
        hint = ": the numbers alone, without their scales" if alone else ""
        raise ValueError(
            f"{path}: {name}: expected {str(dtype)[6:]} {expected} for {shape} in {into}, found {said(w)}"
            f"{hint}; {AGAIN}"
        )
    _, *beside = quantized.split(w)
    ends = [
        x.item() for part in beside for x in part.aminmax()
    ]  # NaN where one is; isfinite is slow
    if not all(map(math.isfinite, ends)):
        raise ValueError(
            f"{path}: {name} has a scale that is not finite; it is damaged, so {AGAIN}"
        )


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer beside quantized weights: Meta's file alone, or one with files that tell its use."""
    if (folder / "generation_config.json").exists():
        return vocabulary.open_folder(folder)
    return vocabulary.open_tokenizer(folder / "tokenizer.model")


def load(
    tensors: llama.Weights,
    params: llama.Params,
    device: str,
    dtype: torch.dtype,
    join: Callable[[str, list[Tensor]], Tensor],
) -> llama.Weights:
    """The weights of such a file on a device: mapped from disk where they need no change."""
    weights: llama.Weights = {}
    for name in llama.weight_shapes(params):
        if name not in tensors:
            weights[name] = weights["tok_embeddings.weight"]
            continue
        w = join(name, [tensors[name].to(device)])
        weights[name] = w if quantized.is_quantized(w) else w.to(dtype)
    llama.forward = quantized.for_quantized(llama.forward)  # type: ignore[assignment]
    return weights


# ------------------------------------------------------------------------------------ writing


def write_folder(
    folder: Path, opened: layouts.Opened, kind: str, advance: Callable[[float], None]
) -> None:
    """Fills an empty folder with a checkpoint in 8 or 4 bits; in memory is one tensor after another.

    opened: as open_checkpoint gives it. advance is told how many numbers are done.
    """
    params, shards, tokenizer, convert, _ = opened
    first = next(iter(shards.values()))
    order = quantized.order_here()
    shapes = llama.weight_shapes(params)
    if "output.weight" not in first:
        del shapes["output.weight"]
    forms = {name: quantized.kind_of(kind, name, shape) for name, shape in shapes.items()}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "group": str(quantized.GROUP),
        "order": order,
        "dtype": str(first["tok_embeddings.weight"].dtype).removeprefix("torch."),
        "forms": json.dumps({name: form for name, form in forms.items() if form}),
    }
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, shape in shapes.items():
        start = end
        if forms[name]:
            F, size = shape[0], quantized.bytes_of(forms[name], shape)
            dtype = torch.int8 if forms[name] == "int8" else in_four(F, order)
            shape, code = (F, size // F // dtype.itemsize), DTYPES[dtype]
        else:
            w = joined(name, shards, convert)
            size, code = w.nbytes, DTYPES[w.dtype]
        end = start + size
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # so that the numbers begin at a whole line of a cache
    with open(folder / NAME, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            w = joined(name, shards, convert)
            made = w
            if forms[name]:
                made = quantized.quantized(w, forms[name], order == "words", name)
            write_bytes(file, made)
            advance(w.numel())
    (folder / "params.json").write_text(json.dumps(plain_params(params), indent=1))
    write_tokenizer(folder, tokenizer)


def joined(
    name: str,
    shards: dict[str, llama.Weights],
    convert: Callable[[str, Tensor], Tensor] | None,
) -> Tensor:
    """One whole tensor of a checkpoint, as it comes into the script."""
    w = llama.joined(name, [shard[name] for shard in shards.values() if name in shard])
    return convert(name, w) if convert else w


def write_bytes(file: BinaryIO, w: Tensor) -> None:
    """The bytes of a tensor."""
    w = w.contiguous()
    file.write(memoryview((ctypes.c_char * w.nbytes).from_address(w.data_ptr())))


def plain_params(params: llama.Params) -> llama.Params:
    """What params.json has to say of a model, no more."""
    told = {key: params[key] for key in (*llama.REQUIRED, *llama.DEFAULTS)}
    if not params["use_scaled_rope"]:
        told = {key: value for key, value in told.items() if not key.startswith("rope_scaling")}
    return {key: value for key, value in told.items() if value != llama.DEFAULTS.get(key)}


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """A tokenizer's own file, and those that tell how it is used."""
    held = vars(tokenizer)
    source, beside = held.get("source") or held["file"], held.get("folder")
    if source.suffix == ".gguf":
        tokenizer_of_gguf(folder, source, tokenizer)
        return
    shutil.copyfile(source, folder / f"tokenizer{source.suffix}")
    if beside is None:  # Meta's: nothing tells its use
        return
    for name in USE:
        if (beside / name).is_dir():
            shutil.copytree(beside / name, folder / name)
        elif (beside / name).is_file():
            shutil.copyfile(beside / name, folder / name)
    if source.suffix == ".json":  # config.json tells which class counts
        path = folder / "tokenizer_config.json"
        settings = layouts.read_json(path) if path.exists() else {}
        settings["tokenizer_class"] = vocabulary.class_of(beside, settings)
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    path = beside / "generation_config.json"
    told = layouts.read_json(path) if path.exists() else {}
    told["eos_token_id"] = vocabulary.stops_of(beside)  # config.json tells some of them
    (folder / path.name).write_text(json.dumps(told, indent=1))


def tokenizer_of_gguf(folder: Path, path: Path, tokenizer: Any) -> None:
    """The tokenizer in a GGUF file's metadata as tokenizer.json and what stands beside it."""
    from parts import gguf_file

    fields, _ = gguf_file.read_headers(gguf_file.files_of(path))
    content, settings, stops = gguf_file.tokenizer_of(fields, path)
    begin, end = tokenizer.begin, tokenizer.end
    if begin or end:
        texts = {n: vocabulary.piece(tokenizer, n).decode() for n in (*begin, *end)}
        parts = [{"SpecialToken": {"id": texts[n], "type_id": 0}} for n in (*begin, *end)]
        parts.insert(len(begin), {"Sequence": {"id": "A", "type_id": 0}})
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": parts,
            "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                text: {"id": text, "ids": [n], "tokens": [text]} for n, text in texts.items()
            },
        }
    for key in ("add_bos_token", "add_eos_token"):
        settings.pop(key)
    for name, told in (
        ("tokenizer.json", content),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": stops}),
    ):
        (folder / name).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
