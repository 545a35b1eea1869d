"""The door: checkpoints in any layout come in with Meta's names and order of rows, checked, or not at all.

Meta's own layout, Hugging Face folders, the .pth files of LLMs-from-scratch (rasbt), files of other names and
GGUF. It says which release it has before it, whether memory is enough, and what is wrong with a file. The
script calls `load_model`.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

import llama3_from_scratch as llama
from llama3_from_scratch import Params, Weights
from parts import archives, config, eager, first_line, printable, processes, quantized, reason, span
from parts.files import openable, read_text
from parts.naming import (
    ADAPTER,
    HUGGING_FACE,
    MERGE_IT,
    META,
    RASBT,
    dialect_of,
    metas_names,
    rows_in_pairs,
    unwrapped,
)
from parts.progress import progress
from parts.remote import local_copy
from parts.table import folded, many, plural, size, width_of

Convert = Callable[[str, Tensor], Tensor]  # what another layout does to a tensor of this name
Shards = dict[str, Weights]  # tensors by Meta's names, by file
# With the tokenizer, and words for the report:
Opened = tuple[Params, Shards, Any, Convert | None, str]

# ------------------------------------------------------------------------------------ what is wrong with it?


def explained(path: Path) -> str | None:
    """What a file is that a failed download has left; None if it is none of these."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        return "an empty file"
    if start.startswith(b"<"):
        return "a web page, left by a download that was refused; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; 'git lfs pull' gets the file itself"
    return None


def explain(path: Path, expected: str, problem: object) -> ValueError:
    """A ValueError that says what a file is instead: downloads may leave a web page or a Git LFS pointer."""
    if not path.exists():
        return ValueError(f"{path}: no such file")
    if not path.is_file():  # a pipe would be waited for
        kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        return ValueError(f"{path}: expected {expected}, found {kind}")
    try:
        found = explained(path)
    except OSError as denied:
        return ValueError(f"{path}: cannot be read ({reason(denied)})")
    found = found or f"one that is damaged or cut short ({first_line(problem)})"
    return ValueError(f"{path}: expected {expected}, found {found}")


def check_file(path: Path, expected: str) -> None:
    """ValueError unless this is a plain file."""
    if not path.is_file():
        raise explain(path, expected, "")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, as a dict."""
    check_file(path, "a JSON object")
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as problem:
        raise explain(path, "a JSON object", problem) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


NUMBERS = {  # key of params.json: (type, smallest, largest)
    "dim": (int, 2, 10**6),
    "n_layers": (int, 1, 1000),
    "n_heads": (int, 1, 10**4),
    "n_kv_heads": (int, 1, 10**4),
    "vocab_size": (int, 257, 10**7),
    "multiple_of": (int, 1, 10**6),
    "ffn_dim_multiplier": (float, 1e-3, 1e3),
    "head_dim": (int, 2, 10**5),
    "ffn_dim": (int, 1, 10**7),
    "norm_eps": (float, 1e-30, 1),
    "rope_theta": (float, 1, 1e12),
    "rope_scaling_factor": (float, 1, 1000),
    "rope_low_freq_factor": (float, 1e-3, 1e3),
    "rope_high_freq_factor": (float, 1e-3, 1e3),
    "rope_original_context": (int, 1, 10**8),
    "max_seq_len": (int, 1, 10**8),
}


# What Meta's own code writes into params.json of a model without eyes.
NO_VISION = {
    "vision_chunk_size": -1,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": -1,
}


def check_params(given: Params, source: object, names: dict[str, str] | None = None) -> Params:
    """fill_params after a look at every value. names: what keys are called in the file, if not as Meta's."""
    given = dict(given)
    words = {key: given.pop(key) for key in ("rope_scaling_from",) if key in given}
    known = {*NUMBERS, "use_scaled_rope", "max_batch_size"}
    unknown = [key for key in given if key not in known]
    for key in [key for key in unknown if given[key] == NO_VISION.get(key, given[key])]:
        if key in NO_VISION or config.says_off(key, given[key]):
            unknown.remove(key)
            del given[key]
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]} is not supported: it may make this another kind of model; if it changes "
            "nothing, take it out of the file"
        )
    if not names:
        with contextlib.suppress(TypeError, ArithmeticError):
            llama.fill_params(given, source)  # what it finds wrong it says as it does alone
    if type(given.get("use_scaled_rope")) not in (type(None), bool):
        raise ValueError(
            f"{source}: use_scaled_rope is {config.shown(given['use_scaled_rope'])}, expected true or false"
        )
    if not given.get("use_scaled_rope") and given.get("rope_scaling_factor") not in (None, 1):
        raise ValueError(
            f"{source}: rope_scaling_factor is {config.shown(given['rope_scaling_factor'])}, but "
            "use_scaled_rope is not true; one of them is wrong"
        )
    for key, (kind, low, high) in NUMBERS.items():
        required = key in ("dim", "n_layers", "n_heads", "vocab_size")
        if given.get(key) is None and not required:
            continue
        value: Any = given.get(key)
        if type(value) not in (int, kind) or not low <= value <= high:
            raise ValueError(
                f"{source}: {(names or {}).get(key, key)} is "
                f"{'missing' if value is None else repr(value)[:40]}, "
                f"expected a {'whole ' * (kind is int)}number {span(low, high)}"
            )
    params = llama.fill_params(given, source)
    H, K, E = params["n_heads"], params["n_kv_heads"], params["head_dim"]
    if H % K or E % 2 or not E or ("head_dim" not in given and params["dim"] % H):
        raise ValueError(
            f"{source}: dim {params['dim']}, {H} heads, {K} key/value heads and head dim {E} do not fit "
            "together"
        )
    if params["rope_high_freq_factor"] <= params["rope_low_freq_factor"]:
        raise ValueError(
            f"{source}: the high frequency factor of RoPE scaling must be above the low one"
        )
    return params | words


def check_tensors(shards: Shards) -> None:
    """Plain numbers in a type to compute in, norms alike in all shards; shapes are the script's affair."""
    first = next(iter(shards.values()))
    for file, shard in shards.items():
        for name, w in shard.items():
            later = w.is_meta and file.endswith(".gguf")  # those are read when their turn comes
            plain = w.layout == torch.strided and not w.is_nested
            if w.dtype not in llama.FLOATS or not plain or (w.is_meta and not later):
                raise ValueError(
                    f"{file}: {name} is {w.dtype}, {w.layout}, on {w.device}; expected plain float32, "
                    "bfloat16 or float16 numbers".replace("torch.", "")
                )
            archives.check_extent(name, w, file)
            if w.dim() != 1 or shard is first or name not in first:
                continue
            if torch.equal(w, first[name]):
                continue
            for place, norm in ((file, w), (next(iter(shards)), first[name])):
                if not norm.isfinite().all():  # then not even equal to itself
                    raise ValueError(
                        f"{place}: {name} holds a number that is not finite; the file is damaged"
                    )
            raise ValueError(
                f"{file}: {name} is not that of the first shard; they are of different models"
            )


def same_numbers(a: Tensor, b: Tensor | None) -> bool:
    """Do two matrices hold the same numbers, in the same memory or not? Heads that differ do at once."""
    if b is None or a.is_meta or a.dim() != 2 or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True  # without a look at all of it
    return torch.equal(a[:1], b[:1]) and torch.equal(a, b)


def is_tied(shards: Shards) -> bool:
    """Is the head the embedding in all shards, because it holds the same numbers or is not there at all?

    Meta's 3.2 files hold the same memory twice, Hugging Face's no head. ValueError if only some have one.
    """
    without = [file for file, shard in shards.items() if "output.weight" not in shard]
    if without and len(without) < len(shards):
        raise ValueError(
            f"{without[0]}: output.weight is missing, but other shards have it; is the download complete?"
        )
    return bool(without) or all(
        same_numbers(shard["output.weight"], shard.get("tok_embeddings.weight"))
        for shard in shards.values()
    )


def what_is_found(
    w: Tensor | None, whole: tuple[int, ...], axis: int | None, files: list[str]
) -> str:
    """Words for a tensor that has not the shape it has in 1 of these files, and what to do.

    Only Meta's files hold slices of tensors: elsewhere a small one is no sign that others are missing.
    """
    if w is None:
        return "no such tensor; is this a part of a model, or are the params another model's?"
    found = list(w.shape)
    if not SHARD.fullmatch(files[0]):
        said = "its metadata's" if files[0].endswith(".gguf") else "config.json's or params.json's"
        return f"{tuple(found)}; the params ({said} sizes) do not fit this tensor"
    if axis is not None and len(found) == len(whole) and found[axis]:
        shards = whole[axis] // found[axis]
        if shards > 1 and shards != len(files) and found[axis] * shards == whole[axis]:
            return f"{tuple(found)}, 1 of {shards}; is the download complete?"
    return f"{tuple(found)}; the params are another model's"


def check_shapes(shards: Shards, params: Params, folder: Path = Path()) -> None:
    """ValueError unless each shard has its slice of every tensor, and none that does not belong there."""
    shapes = llama.weight_shapes(params)
    if not any("output.weight" in shard for shard in shards.values()):
        del shapes["output.weight"]
    for (name, shape), (file, shard) in itertools.product(shapes.items(), shards.items()):
        expected = list(shape)
        axis = llama.SHARD_AXIS.get(name.split(".")[-2])  # norms are whole in each
        if axis is not None:
            expected[axis] //= len(shards)
        if name not in shard or list(shard[name].shape) != expected:
            raise ValueError(
                f"{named(file, folder)}: {name}: expected shape {tuple(expected)} for 1 of {len(shards)} "
                f"shards, found {what_is_found(shard.get(name), shape, axis, [*shards])}"
            )
    for file, shard in shards.items():
        # rope.freqs is Llama 2's, and not needed
        unknown = shard.keys() - shapes.keys() - {"output.weight", "rope.freqs"}
        if unknown:
            raise ValueError(
                f"{named(file, folder)}: {min(unknown)}: a Llama of these sizes has no such tensor"
            )


def named(file: str, folder: Path) -> str:
    """What an error calls a file of a folder, or all files of a kind there."""
    if (folder / file).is_file():
        return str(folder / file)
    return file if folder == Path() else f"{folder}: {file}"


def free_memory(device: str) -> float:
    """Bytes that can still be allocated, as far as the system tells; else infinitely many."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "cpu" and Path("/proc/meminfo").is_file():
        free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return int(free[1]) * 1024 if free else math.inf
    return math.inf


def check_memory(params: Params, held: int, device: str, itemsize: int, positions: int) -> None:
    """Weights (so many bytes) and cache of this run, known from headers alone, against what is free."""
    sharing = (
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device == "cpu" and processes()[1] > 1 else 1
    )  # one memory for all
    weights = sharing * held
    cache = (
        params["n_layers"]
        * 2
        * params["n_kv_heads"]
        * positions
        * params["head_dim"]
        * itemsize
        * sharing
    )
    free = free_memory(device)
    if weights + cache > free:
        raise ValueError(
            f"{weights / 1e9:.1f} GB of weights and {cache / 1e9:.1f} GB of cache are more than the "
            f"{free / 1e9:.1f} GB that are free; --dtype bfloat16, --layers N or fewer tokens need less, "
            "--force tries all the same"
        )


RELEASES = {  # (dim, layers, RoPE scaling): name; 3.1 and 3.3 70B have the same sizes
    (4096, 32, False): "Llama 3 8B", (8192, 80, False): "Llama 3 70B", (4096, 32, True): "Llama 3.1 8B",
    (8192, 80, True): "Llama 3.1 or 3.3 70B", (16384, 126, True): "Llama 3.1 405B",
    (2048, 16, True): "Llama 3.2 1B", (3072, 28, True): "Llama 3.2 3B",
}  # fmt: skip
LLAMA_3_TOKENS = range(128256, 129000)  # fine-tunes have a few more, or rows to spare
LLAMA_2 = {(4096, 32): "Llama 2 7B", (5120, 40): "Llama 2 13B", (8192, 80): "Llama 2 70B"}


def release(params: Params) -> str | None:
    """Which release, or fine-tune of it with a few tokens more, has these sizes; None if none has."""
    sizes = params["dim"], params["n_layers"]
    if params["vocab_size"] == 32000 and params["rope_theta"] == 10000:
        return LLAMA_2.get(sizes)
    if params["vocab_size"] in LLAMA_3_TOKENS and params["rope_theta"] == 500000:
        return RELEASES.get((*sizes, params["use_scaled_rope"]))
    return None


def named_by_size(params: Params) -> str:
    """Which release this looks like, or its dim."""
    return release(params) or f"dim {params['dim']}"


def understood(params: Params, shards: Shards) -> str:
    """Words for the report: how RoPE is scaled and why, duplicated heads."""
    name = release(params)
    words = ["RoPE scaling off"]
    if params["use_scaled_rope"]:
        why = f"{name}, dim {params['dim']}" if "3.2" in (name or "") else "as in Meta's code"
        why = params.get("rope_scaling_from", why)
        words[0] = f"RoPE scaling {params['rope_scaling_factor']:g} ({why})"
    K = params["n_kv_heads"]
    # 405B's 16 shards each hold one of 8 heads, so each head stands there twice.
    if K > 8 and K % 2 == 0:
        wk = torch.cat([shard["layers.0.attention.wk.weight"] for shard in shards.values()]).view(
            K, -1
        )
        if torch.equal(wk[0::2], wk[1::2]):
            words.append(f"{K // 2} key/value heads, each held twice")
    return ", ".join(words)


# ------------------------------------------------------------------------------------ Hugging Face


def hugging_face_params(path: Path) -> tuple[Params, bool]:
    """config.json as Meta's params; and is the head said to be the embedding?"""
    given, tied = config.metas_params(read_json(path), path)
    return check_params(given, path, config.NAMES), tied


def open_safetensors(path: Path) -> Weights:
    """The tensors of a .safetensors file by name, on the mapped file: nothing is read or copied yet."""
    check_file(path, "a safetensors file")
    try:
        with openable(path) as name, safetensors.safe_open(name, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
    except Exception as problem:  # safetensors, torch and the system each have their own
        raise explain(path, "a safetensors file", problem) from None


def open_tensors(path: Path) -> Weights:
    """The tensors of a file by the names that they have there."""
    return open_safetensors(path) if path.suffix == ".safetensors" else checked_pth(path)


def files_of(folder: Path) -> tuple[list[str], dict[str, str] | None, str]:
    """Files of weights in a Hugging Face folder, which tensor is in which, if an index says, and its name."""
    for stem in ("model.safetensors", "pytorch_model.bin"):  # as transformers looks for them
        if (folder / stem).exists():
            return [stem], None, ""
        index = folder / f"{stem}.index.json"
        if not index.exists():
            continue
        where = read_json(index).get("weight_map")
        whole = isinstance(where, dict) and all(isinstance(name, str) for name in where.values())
        if not where or not isinstance(where, dict) or not whole:
            raise ValueError(f"{index}: no weight_map from tensors to files")
        files = sorted({*where.values()})
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"{index}: it points to {name!r}, outside the folder")
            if not (folder / name).exists():
                raise ValueError(
                    f"{folder / name}: no such file, but {index.name} names it; is the download complete?"
                )
        return files, where, index.name
    kinds = (".bin", ".pt", ".safetensors")
    others = sorted(file.name for file in folder.glob("*.*") if file.suffix in kinds)
    only = f", only {others[0]}; if that is the model, give the file itself" if others else ""
    if others and re.search(r"-\d+-of-\d+\.", others[0]):
        only = f", only {others[0]}; is the download complete?"
    raise ValueError(
        f"{folder}: neither model.safetensors nor model.safetensors.index.json is there, nor "
        f"pytorch_model.bin{only}"
    )


def settle_head(tensors: Weights, tied: bool, folder: Path) -> str:
    """Takes out a head that is the embedding. Words for the report where config.json and file disagree.

    A head trained apart and merged into a tied model stands in the file, and so counts: transformers, #42612.
    """
    head, embedding = tensors.get("output.weight"), tensors.get("tok_embeddings.weight")
    if head is None and not tied:
        raise ValueError(
            f"{folder}: lm_head.weight is missing, and config.json does not say tie_word_embeddings; a "
            "model saved without its head (by AutoModel) cannot go on with a text"
        )
    if head is None or not tied:
        return ""
    if embedding is None:  # of two that are one, safetensors keeps the first in the alphabet
        tensors["tok_embeddings.weight"] = tensors.pop("output.weight")
    elif same_numbers(head, embedding):
        del tensors["output.weight"]
    else:
        return ", with the file's own head, though config.json says that it is tied"
    return ""


def open_hugging_face(folder: Path) -> Opened:
    """A folder in Hugging Face's layout."""
    from parts import vocabulary

    params, tied = hugging_face_params(folder / "config.json")
    files, where, index = files_of(folder)
    tensors: Weights = {}
    for name in files:
        for key, tensor in open_tensors(folder / name).items():
            if where is None or where.get(key, name) == name:
                tensors[key] = tensor
    for key, file in (where or {}).items():
        if key not in tensors:
            raise ValueError(f"{folder / file}: {key} is missing, but {index} says that it is here")
    dialect_of(tensors, folder)  # if they are nobody's, that is the true cause
    tensors = metas_names(tensors, HUGGING_FACE, folder)
    head = settle_head(tensors, tied, folder)
    kind = Path(files[0]).suffix.removeprefix(".")
    words = f"Hugging Face layout, {len(files)} {kind} file{'s' * (len(files) > 1)}{head}"
    return (
        params,
        {f"the {kind} files": tensors},
        vocabulary.open_folder(folder),
        rows_in_pairs(params),
        words,
    )


# ------------------------------------------------------------------------------------ one file, of any name


RASBTS = {  # dim, layers, feed-forward, rows of wq and wk: heads, and the factor of RoPE scaling, if one
    (2048, 16, 8192, 2048, 512): (32, 32),
    (3072, 28, 8192, 3072, 1024): (24, 32),
    (4096, 32, 14336, 4096, 1024): (32, None),  # 3 or 3.1?
    (8192, 80, 28672, 8192, 1024): (64, None),
    (16384, 126, 53248, 16384, 1024): (128, 8),
}


def sizes_from_tensors(tensors: Weights, path: Path) -> Params:
    """Params of a file without any: of a release of Llama 3, by its shapes. What they do not tell is None."""
    try:
        V, D = tensors["tok_embeddings.weight"].shape
        F, HE, KE = (
            len(tensors[f"layers.0.{name}.weight"])
            for name in ("feed_forward.w1", "attention.wq", "attention.wk")
        )
        layers = {int(name.split(".")[1]) for name in tensors if name.startswith("layers.")}
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"{path}: not a Llama of LLMs-from-scratch: a tensor is missing or misshapen"
        ) from None
    known = RASBTS.get((D, max(layers) + 1, F, HE, KE))
    if known is None or V not in LLAMA_3_TOKENS:
        raise ValueError(
            f"{path}: a Llama of {max(layers) + 1} layers, dim {D} and {V} tokens is none of Llama 3's "
            "releases, and tensors do not tell the number of heads nor theta and scaling of RoPE; put a "
            "params.json or a config.json that does beside it"
        )
    heads, factor = known
    return check_params(
        {
            "dim": D,
            "vocab_size": V,
            "n_layers": max(layers) + 1,
            "n_heads": heads,
            "n_kv_heads": 8,  # so have all of them
            "ffn_dim": F,
            "norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
            "rope_scaling_factor": factor,
            "rope_scaling_from": factor and "LLMs-from-scratch has this Llama",
        },
        path,
    )


def open_file(path: Path) -> Opened:
    """A file of any name, with params beside it: by its tensors' names it is Meta's, Hugging Face's, rasbt's.

    torchtune's meta_model_0.pt stands beside original/, or a folder below it; its params are there.
    """
    tensors = open_tensors(path)
    dialect = dialect_of(tensors, path)
    tensors = metas_names(tensors, dialect, path)
    owner, wanted = BESIDE[dialect]
    above = path.parent.parent
    places = [path.parent]
    if dialect == META:
        places += [path.parent / "original", above, above / "original"]
    found = [place / name for place in places for name in wanted if (place / name).exists()]
    if not found and dialect != RASBT:
        raise ValueError(
            f"{path}: its sizes are not in it, and no {' or '.join(wanted)} is beside it"
        )
    tokenizer, head = tokenizer_of(path, places), ""
    if not found:
        params = sizes_from_tensors(tensors, path)
    elif found[0].name == "config.json":
        params, tied = hugging_face_params(found[0])
        head = settle_head(tensors, tied, path)
    else:
        params = metas_params(found[0], tokenizer)
    if not found or found[0].name == "params.json":
        head = missing_head({path.name: tensors}, params, path)
    words = f"{owner} layout, 1 file{f' with {found[0].name}' if found else ''}{head}"
    convert = None if dialect == META else rows_in_pairs(params)
    return params, {path.name: tensors}, tokenizer, convert, words


BESIDE = {  # whose names: words for the report, and what says the sizes
    META: ("Meta", ("params.json",)),
    HUGGING_FACE: ("Hugging Face", ("config.json", "params.json")),
    RASBT: ("LLMs-from-scratch", ("params.json", "config.json")),
}


def tokenizer_of(path: Path, places: list[Path]) -> Any:
    """The tokenizer that stands with a file, in the first of these folders that has one."""
    from parts import vocabulary

    for folder in places:
        if (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists():
            return vocabulary.open_folder(folder)
    raise ValueError(f"{path}: neither tokenizer.model nor tokenizer.json is beside it")


# ------------------------------------------------------------------------------------ which layout is it?


def checked_pth(path: Path) -> Weights:
    """The tensors of a .pth file by name, mapped from disk if they can be, and words on what is wrong."""
    check_file(path, "a PyTorch checkpoint")
    unpacked = archives.bytes_to_unpack(path)
    if unpacked > free_memory("cpu"):
        raise ValueError(
            f"{path}: its records are compressed, and {unpacked / 1e9:.1f} GB when unpacked, more than is "
            "free; unpack it elsewhere: torch.load and torch.save write it plainly"
        )
    try:
        with openable(path) as name, warnings.catch_warnings():
            # an error is one line, and torch has more to say of odd files
            warnings.simplefilter("ignore")
            held = torch.load(name, mmap=not unpacked, weights_only=True, map_location="cpu")
    except Exception as problem:  # torch raises a dozen kinds for a file that is no checkpoint
        said = str(problem).partition(". ")[0]
    else:
        return unwrapped(held, path)
    if "weights_only" in said or "Weights only" in said or "Unsupported" in said:
        raise ValueError(
            f"{path}: it holds more than tensors, and loading it could run code; it was not loaded"
        )
    if "mmap can only be used" in said and not explained(path):
        raise ValueError(
            f"{path}: in PyTorch's old format, or damaged; if you trust it, torch.load and torch.save it"
        )
    raise explain(path, "a PyTorch checkpoint", said)


def embedding_by_rows(shards: Shards, vocab_size: int) -> None:
    """Llama 2's shards have the embedding cut by columns: here they get it by rows, as Llama 3's have it."""
    name = "tok_embeddings.weight"
    slices = [shard[name] for shard in shards.values() if name in shard]
    alike = len({w.shape for w in slices}) == 1 and len(slices) == len(shards) > 1
    if alike and slices[0].dim() == 2 and len(slices[0]) == vocab_size:
        for shard, rows in zip(shards.values(), torch.cat(slices, 1).chunk(len(shards))):
            shard[name] = rows


SHARD = re.compile(r"consolidated\.\d\d\.pth")


def metas_params(path: Path, tokenizer: Any) -> Params:
    """All sizes of a model, from its params.json."""
    given = read_json(path)
    if given.get("vocab_size") == -1:  # Llama 2 leaves it to the tokenizer
        given["vocab_size"] = tokenizer.n_vocab
    if given.get("rope_scaling_factor") is not None:
        given["rope_scaling_from"] = "params.json"
    return check_params(given, path)


def missing_head(shards: Shards, params: Params, source: Path) -> str:
    """Words for the report where there is no output.weight; ValueError where the release has one.

    Meta's own files all have it; torchtune leaves it out of those of Llama 3.2, where it is the embedding.
    """
    if any("output.weight" in shard for shard in shards.values()):
        return ""
    name = release(params)
    if name and "3.2" not in name:
        raise ValueError(f"{source}: output.weight is missing, and {name} has one of its own")
    return ", no output.weight, so the embedding is the head"


def open_meta(folder: Path) -> Opened:
    """A folder in Meta's layout."""
    from parts import vocabulary

    model_file = vocabulary.find_model_file(folder, above=True)
    count = len([file for file in folder.glob("consolidated.*.pth") if SHARD.fullmatch(file.name)])
    files = [folder / f"consolidated.{n:02}.pth" for n in range(count or 1)]
    for path in (folder / "params.json", model_file, *files):
        if path.exists():
            continue
        others = sorted(file.name for file in folder.glob(f"{path.stem}*{path.suffix}"))
        hint = (
            f"{others[0]!r} is there, under another name" if others else "is the download complete?"
        )
        raise ValueError(f"{path}: no such file; {hint}")
    tokenizer = vocabulary.open_tokenizer(model_file)
    params = metas_params(folder / "params.json", tokenizer)
    shards = {path.name: metas_names(checked_pth(path), META, path) for path in files}
    embedding_by_rows(shards, params["vocab_size"])
    head = missing_head(shards, params, folder)
    words = f"Meta layout, {len(files)} shard{'s' * (len(files) > 1)}{head}"
    return params, shards, tokenizer, None, words


def find_layouts(path: Path) -> dict[str, Callable[[], Opened]]:
    """What is in a folder: a dict from the name of a layout to what opens it."""
    from parts import quantized_files

    layouts: dict[str, Callable[[], Opened]] = {}
    if (path / quantized_files.NAME).exists():
        file = path / quantized_files.NAME
        layouts["weights in 8 or 4 bits"] = functools.partial(quantized_files.open_quantized, file)
    for folder, name in (
        (path, "Meta's layout"),
        (path / "original", "Meta's layout in original/"),
    ):
        if any(folder.glob("consolidated.*.pth")):
            layouts[name] = functools.partial(open_meta, folder)
    weights = [*path.glob("model*.safetensors*"), *path.glob("pytorch_model*.bin*")]
    ggufs = gguf_layouts(path)  # their folders on the hub have a config.json too
    if weights or ((path / "config.json").exists() and not ggufs):
        layouts["Hugging Face's layout"] = functools.partial(open_hugging_face, path)
    for file in sorted(path.glob("*.pth")):
        if not file.name.startswith("consolidated."):
            layouts[file.name] = functools.partial(open_file, file)
    tuned = [file for file in path.glob("meta_model_*.pt") if file.stem[11:].isdecimal()]
    tuned.sort(key=lambda file: -int(file.stem[11:]))  # an epoch each; the last first
    for file in tuned:
        layouts[file.name] = functools.partial(open_file, file)
    layouts |= ggufs
    singles = [*path.glob("*.safetensors"), *path.glob("*.pt")]
    if not layouts and len(singles) == 1:
        layouts[singles[0].name] = functools.partial(open_file, singles[0])
    if not layouts and (path / "params.json").exists():
        layouts["Meta's layout"] = functools.partial(open_meta, path)
    return layouts


# Files with a model of their own, beside which an adapter may lie.
WHOLE = (
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "consolidated.*",
    "original/consolidated.*",
    "meta_model_*.pt",
    "*.pth",
    "*.gguf",
    "quantized.safetensors",
)


def refuse_adapter(path: Path) -> str:
    """Words for the report where a LoRA adapter lies beside a model; ValueError if this is nothing else."""
    if path.name == ADAPTER or path.name.startswith("adapter_model."):
        raise ValueError(f"{path}: {MERGE_IT}")
    folder = path if path.is_dir() else path.parent
    if not (folder / ADAPTER).exists():
        return ""
    if path.is_dir() and not any(file for kind in WHOLE for file in path.glob(kind)):
        raise ValueError(f"{path}: {MERGE_IT}")
    return ", an adapter beside it is not used"


def gguf_layouts(folder: Path) -> dict[str, Callable[[], Opened]]:
    """The GGUF files of a folder, as in find_layouts; of one that is split, the first."""
    from parts import gguf_file

    files = [file for file in sorted(folder.glob("*.gguf")) if gguf_file.is_first(file)]
    return {file.name: functools.partial(gguf_file.open_gguf, file) for file in files}


def layouts_of_file(file: Path) -> dict[str, Callable[[], Opened]]:
    """The layout that a single file belongs to, as in find_layouts."""
    from parts import quantized_files

    if file.name == quantized_files.NAME:
        return {file.name: lambda: quantized_files.open_quantized(file)}
    stem = r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    if SHARD.fullmatch(file.name) or file.name == "params.json":
        return {"Meta's layout": lambda: open_meta(file.parent)}
    if file.suffix == ".gguf":
        from parts import gguf_file

        return {file.name: lambda: gguf_file.open_gguf(file)}
    if file.name == "config.json" or (
        re.fullmatch(stem, file.name) and (file.parent / "config.json").exists()
    ):
        return {"Hugging Face's layout": lambda: open_hugging_face(file.parent)}
    if file.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        return {file.name: lambda: open_file(file)}
    raise ValueError(
        f"{file}: not a file of a checkpoint that can be read; .pth, .pt, .bin, .safetensors and .gguf can"
    )


def downloaded(name: str) -> Path | None:
    """The folder of a model that weights/download.py knows by this name; None if it knows none."""
    file = llama.HERE / "weights" / "download.py"
    if not file.is_file() or not re.fullmatch(r"[\w.-]+", name):
        return None
    spec: Any = importlib.util.spec_from_file_location("download", file)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    known = program.looked_up(name)
    if known is None:
        return None
    folder: Path = program.folder_of(known)
    if not folder.is_dir() or any(folder.glob("*.part")):
        state = "not whole yet" if folder.is_dir() else "not here yet"
        raise ValueError(f"{name}: {state}; python {program.short(file)} {known} brings it")
    return folder


def short(path: str | Path) -> str:
    """A path as a user typed it; of the default, which nobody typed, as short as it can be from here."""
    if str(path) != str(llama.TINY):
        return str(path)
    here = os.path.relpath(llama.TINY)
    return str(path) if here.startswith(os.pardir) else here


def open_checkpoint(
    path: str | Path, rope_scaling_factor: float | None = None, cache_dir: str | None = None
) -> Opened:
    """Opens what a user points at: a folder in any layout, one file of it, a remote folder. All is checked.

    Returns params, shards (by file name: tensors by Meta's name), tokenizer, what is to be done to each whole
    tensor (or None), and words for the report.
    """
    from parts import vocabulary

    local = local_copy(path, cache_dir)
    if not local.exists():
        local = downloaded(str(path)) or local
    if not local.is_dir() and not local.is_file():
        found = "neither a file nor a folder" if local.exists() else "no such file or folder"
        raise ValueError(f"{path}: {found}")
    adapter = refuse_adapter(local)
    layouts = find_layouts(local) if local.is_dir() else layouts_of_file(local)
    if not layouts:
        held = sorted(file.name for file in local.iterdir())
        listed = ", ".join(held[:5]) or "nothing"
        if len(held) > 5:
            listed += " …"
        raise ValueError(
            f"{path}: no checkpoint there: no params.json with consolidated.00.pth, no config.json with "
            f"model.safetensors, no llama3.2-….pth, no .gguf; it holds {listed}"
        )
    taken, *others = layouts
    params, shards, tokenizer, convert, words = layouts[taken]()
    if others:
        words += f" (there is also {', '.join(others)})"
    words += adapter
    if rope_scaling_factor:
        if not params["use_scaled_rope"]:
            raise ValueError(
                f"{path}: --rope-scaling-factor is for models with RoPE scaling; this one has none"
            )
        if params.get("rope_scaling_from", "") is None and rope_scaling_factor == 1:
            params |= {"use_scaled_rope": False, "max_seq_len": 8192}
        params |= {
            "rope_scaling_factor": rope_scaling_factor,
            "rope_scaling_from": "--rope-scaling-factor",
        }
    elif params.get("rope_scaling_from", "") is None:
        raise ValueError(
            f"{path}: its tensors do not tell whether RoPE is scaled: --rope-scaling-factor 8 says that it "
            "is, as of Llama 3.1 or 3.3, and 1 that it is not, as of Llama 3; or put a params.json beside it"
        )
    if not hasattr(convert, "saved"):  # those in 8 or 4 bits have been checked
        check_tensors(shards)
        tied = is_tied(shards)
        check_shapes(shards, params, local if local.is_dir() else local.parent)
        if tied:
            for shard in shards.values():
                shard.pop("output.weight", None)
    vocabulary.check_rows(tokenizer, params["vocab_size"], path)
    if tokenizer.n_vocab < params["vocab_size"]:
        words += f", {params['vocab_size'] - tokenizer.n_vocab} rows that are no token's"
        params |= {"n_tokens": tokenizer.n_vocab}
    return params, shards, tokenizer, convert, f"{words}, {understood(params, shards)}"


def load_model(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    n_layers: int | None = None,
    rope_scaling_factor: float | None = None,
    cache_dir: str | None = None,
    positions: Callable[[Any, int], int] | None = None,
    force: bool = False,
    quiet: bool = False,
    quantize: str | None = None,
) -> llama.Model:
    """Weights, params and tokenizer of a checkpoint; unless quiet, a line on stderr says what was found.

    n_layers: only the first so many. positions(tokenizer, context): how many the cache will hold; if it and
    the weights take more memory than is free, ValueError, unless force. quantize: "int8" or "int4", as
    parts/quantized.py explains.
    """
    started = time.perf_counter()
    where = printable(short(path))
    short_name = printable(Path(where).name)
    with progress(f"opening {short_name}"):
        params, shards, tokenizer, convert, words = open_checkpoint(
            path, rope_scaling_factor, cache_dir
        )
    of = params["n_layers"]
    if not 0 < (n_layers or of) <= of:
        raise ValueError(f"{path} has {of} layers, {n_layers} are asked for")
    params = params | {"n_layers": n_layers or of}
    first = next(iter(shards.values()))
    saved: dict[str, Any] = getattr(convert, "saved", {})  # of a folder of tools/quantize.py
    if saved and quantize is not None:
        raise ValueError(
            f"--quantize {quantize}: {path} is in {saved['kind']} already; leave the flag out, or take the "
            "weights that it was made of"
        )
    dtype = dtype or saved.get("dtype") or first["tok_embeddings.weight"].dtype

    _, N = processes()
    if N > 1 and saved:
        raise ValueError(
            f"{path}: weights in {saved['kind']} are not for several processes, each of which would hold a "
            "share; start the script alone, without torchrun"
        )
    own, shapes = params, llama.weight_shapes(params)
    if N > 1:
        from parts import parallel

        parallel.check_same_model(params, shards, tokenizer, convert)
        own = parallel.share_of_params(params, N)
        shapes = parallel.share_of_shapes(own, N)
        words += f", one of {N} shares"
    tied = "output.weight" not in first
    count = sum(
        math.prod(shape) for name, shape in shapes.items() if not (tied and name == "output.weight")
    )
    held = count * dtype.itemsize
    quantize = saved.get("kind", quantize)
    if quantize is not None:
        quantized.check_kind(quantize)
        held = quantized.size_of(shapes, quantize, dtype, tied and N == 1)
    if not force:
        room = positions(tokenizer, params["max_seq_len"]) if positions else 0
        check_memory(own, held, device, dtype.itemsize, room)

    def join(name: str, slices: list[Tensor]) -> Tensor:
        w = llama.joined(name, slices)
        w = convert(name, w) if convert else w
        advance(w.nbytes)
        return w

    eager.keep_freed_memory()
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    doing = "quantizing" if quantize and not saved else "reading"
    with progress(f"{doing} {short_name}", total if N == 1 else 0, "B") as advance:
        if N > 1:
            weights = parallel.load_share(shards, own, device, dtype, convert, quantize=quantize)
            llama.forward = quantized.for_quantized(llama.forward)  # type: ignore[assignment]
        elif saved:
            from parts import quantized_files

            weights = quantized_files.load(first, params, device, dtype, join)
        elif quantize is not None:
            weights = quantized.load(shards, params, device, dtype, join, quantize)
        else:
            weights = llama.load_weights(shards, params, device, dtype, join)
    if not quiet:
        layers = f"{n_layers} of {of} layers" if n_layers not in (None, of) else plural(of, "layer")
        bytes_of = f"{size(held)} of {quantize or str(dtype).removeprefix('torch.')}"
        what = [
            named_by_size(params),
            layers,
            f"{many(count)} parameters",
            bytes_of,
        ]
        what[0] = f"{where}: {what[0]}"
        how = printable(words).split(", ")  # of file names
        how += ["tied head" if tied else "own head", device]
        how += [f"{time.perf_counter() - started:.1f} s"]
        for line in (what, how):
            print(folded(line, ", ", width_of(sys.stderr)), file=sys.stderr)
    return weights, own, tokenizer
