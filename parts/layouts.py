"""The door: checkpoints in any layout come in with Meta's names and order of rows, checked, or not at all.

Meta's own layout, Hugging Face folders, the .pth files of LLMs-from-scratch (rasbt), Llama 2's tokenizer
and remote folders. It says which release it has before it, whether memory is enough, and what is wrong with a
file. The script calls `load_model`.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

import llama3_from_scratch as llama
from llama3_from_scratch import Params, Weights
from parts import eager, first_line, printable, processes
from parts.remote import local_copy

Convert = Callable[[str, Tensor], Tensor]  # what another layout does to a tensor of this name
Shards = dict[str, Weights]  # tensors by Meta's names, by file
Opened = tuple[
    Params, Shards, Any, Convert | None, str
]  # with the tokenizer, and words for the report

NAMES = [  # Meta's, Hugging Face's, rasbt's; each followed by ".weight"
    ("tok_embeddings", "model.embed_tokens", "tok_emb"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "trf_blocks.{}.norm1"),
    ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "trf_blocks.{}.att.W_query"),
    ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "trf_blocks.{}.att.W_key"),
    ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "trf_blocks.{}.att.W_value"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "trf_blocks.{}.att.out_proj"),
    ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "trf_blocks.{}.norm2"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "trf_blocks.{}.ff.fc1"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "trf_blocks.{}.ff.fc2"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "trf_blocks.{}.ff.fc3"),
    ("norm", "model.norm", "final_norm"),
    ("output", "lm_head", "out_head"),
]
META, HUGGING_FACE, RASBT = range(3)


def metas_names(tensors: Weights, dialect: int) -> Weights:
    """The same tensors under Meta's names. A name not in the table stays, for the script to refuse."""
    table, metas = (
        {names[dialect]: names[META] for names in NAMES},
        {names[META] for names in NAMES},
    )
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(
            "rotary_emb.inv_freq"
        ):  # old Hugging Face files hold it; the script computes it
            continue
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name.removesuffix(".weight")
        if layer:
            pattern = pattern.replace(layer[0], ".{}.", 1)
        if pattern in metas:
            raise ValueError(
                f"{name} is one of Meta's names; in Meta's layout the file is consolidated.00.pth"
            )
        known = table.get(pattern) if name.endswith(".weight") else None
        renamed[f"{known.format(layer and layer[1])}.weight" if known else name] = tensor
    return renamed


def rows_in_pairs(params: Params) -> Convert:
    """A function (name, tensor) -> tensor: brings rows of wq and wk from two halves to neighbouring pairs.

    Hugging Face and rasbt rotate the first half of a head against the second, Meta each number against its
    neighbour; only these two matrices differ (transformers, convert_llama_weights_to_hf.py).
    """

    def convert(name: str, w: Tensor) -> Tensor:
        if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
            return w
        return w.view(-1, 2, params["head_dim"] // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    return convert


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
    if not path.is_file():
        return ValueError(
            f"{path}: expected {expected}, found {'a folder' if path.is_dir() else 'no file'}"
        )
    try:
        found = explained(path)
    except OSError as reason:
        return ValueError(f"{path}: cannot be read ({reason.strerror})")
    found = found or f"one that is damaged or cut short ({first_line(problem)})"
    return ValueError(f"{path}: expected {expected}, found {found}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, as a dict."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError
        found = json.loads(path.read_text(encoding="utf-8"))
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


def check_params(given: Params, source: object, names: dict[str, str] | None = None) -> Params:
    """fill_params after a look at every value. names: what keys are called in the file, if not as Meta's."""
    given = dict(given)
    words = {key: given.pop(key) for key in ("rope_scaling_from",) if key in given}
    known = {*NUMBERS, "use_scaled_rope", "max_batch_size"}
    unknown = [key for key in given if key not in known and given[key] is not None]
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]} is not supported: it may make this another kind of model; if it changes "
            "nothing, take it out of the file"
        )
    if not names:
        with contextlib.suppress(TypeError, ArithmeticError):
            llama.fill_params(given, source)  # what it finds wrong it says as it does alone
    if given.get("use_scaled_rope") not in (None, True, False):
        raise ValueError(
            f"{source}: use_scaled_rope is {given['use_scaled_rope']!r}, expected true or false"
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
                f"expected a {'whole ' * (kind is int)}number from {low:g} to {high:g}"
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
            if (
                w.dtype not in (torch.float32, torch.bfloat16, torch.float16)
                or w.layout != torch.strided
                or w.is_meta
            ):
                raise ValueError(
                    f"{file}: {name} is {w.dtype}, {w.layout}, on {w.device}; expected plain float32, "
                    "bfloat16 or float16 numbers".replace("torch.", "")
                )
            if (
                w.dim() == 1
                and shard is not first
                and name in first
                and not torch.equal(w, first[name])
            ):
                raise ValueError(
                    f"{file}: {name} is not that of the first shard; they are of different models"
                )


def is_tied(shard: Weights) -> bool:
    """Is the head the embedding? Meta's 3.2 files hold it as the same memory, others not at all."""
    head = shard.get("output.weight")
    embedding = shard.get("tok_embeddings.weight")
    return head is None or (embedding is not None and head.data_ptr() == embedding.data_ptr())


def check_shapes(shards: Shards, params: Params) -> None:
    """ValueError unless each shard has its slice of every tensor, and none that does not belong there."""
    shapes = llama.weight_shapes(params)
    if is_tied(next(iter(shards.values()))):
        del shapes["output.weight"]
    for (name, shape), (file, shard) in itertools.product(shapes.items(), shards.items()):
        expected = list(shape)
        axis = llama.SHARD_AXIS.get(name.split(".")[-2])  # norms are whole in each
        if axis is not None:
            expected[axis] //= len(shards)
        if name not in shard or list(shard[name].shape) != expected:
            found = tuple(shard[name].shape) if name in shard else "no such tensor"
            raise ValueError(
                f"{file}: {name}: expected shape {tuple(expected)} for 1 of {len(shards)} shards, "
                f"found {found}; are all there, do they and the params belong together?"
            )
    for file, shard in shards.items():
        unknown = (
            shard.keys() - shapes.keys() - {"output.weight", "rope.freqs"}
        )  # Llama 2's, not needed
        if unknown:
            raise ValueError(f"{file}: {min(unknown)}: a Llama of these sizes has no such tensor")


def free_memory(device: str) -> float:
    """Bytes that can still be allocated, as far as the system tells; else infinitely many."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "cpu" and Path("/proc/meminfo").is_file():
        free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return int(free[1]) * 1024 if free else math.inf
    return math.inf


def check_memory(params: Params, numbers: int, device: str, itemsize: int, positions: int) -> None:
    """Weights (so many numbers) and cache of this run, known from headers alone, against what is free."""
    sharing = (
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device == "cpu" and processes()[1] > 1 else 1
    )  # one memory for all
    weights = sharing * numbers * itemsize
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
LLAMA_2 = {(4096, 32): "Llama 2 7B", (5120, 40): "Llama 2 13B", (8192, 80): "Llama 2 70B"}


def understood(params: Params, shards: Shards) -> str:
    """Words for the report: which release this looks like, how RoPE is scaled and why, duplicated heads."""
    sizes, scaled = (params["dim"], params["n_layers"]), params["use_scaled_rope"]
    name = LLAMA_2.get(sizes) if params["vocab_size"] == 32000 else RELEASES.get((*sizes, scaled))
    words = [name or f"no release's size (dim {params['dim']})", "RoPE scaling off"]
    if scaled:
        why = f"{name}, dim {params['dim']}" if "3.2" in (name or "") else "as in Meta's code"
        why = params.get("rope_scaling_from", why)
        words[1] = f"RoPE scaling {params['rope_scaling_factor']:g} ({why})"
    K = params["n_kv_heads"]
    if (
        K > 8 and K % 2 == 0
    ):  # 405B's 16 shards each hold one of 8 heads, so each head stands there twice
        wk = torch.cat([shard["layers.0.attention.wk.weight"] for shard in shards.values()]).view(
            K, -1
        )
        if torch.equal(wk[0::2], wk[1::2]):
            words.append(f"{K // 2} key/value heads, each held twice")
    return ", ".join(words)


# ------------------------------------------------------------------------------------ Hugging Face


ROPE_KEYS = set(
    "rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings "
    "partial_rotary_factor".split()
)


def hugging_face_params(path: Path) -> tuple[Params, bool]:
    """config.json in either dialect (rope_scaling, or transformers 5's rope_parameters) as Meta's params."""
    config = read_json(path)
    expected = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    foreign = (
        "quantization_config vision_config num_local_experts num_experts sliding_window logit_scale "
        "logits_scaling residual_multiplier attention_multiplier embedding_multiplier use_qk_norm"
    ).split()
    for key, value in (expected | dict.fromkeys(foreign) | {"partial_rotary_factor": 1.0}).items():
        if (
            config.get(key) not in (value, None, False)
            or key == "model_type"
            and config.get(key) is None
        ):
            raise ValueError(
                f"{path}: {key} is {repr(config.get(key))[:60]}, which is not supported"
            )
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "vocab_size": "vocab_size",
        "norm_eps": "rms_norm_eps",
        "ffn_dim": "intermediate_size",
        "head_dim": "head_dim",
        "max_seq_len": "max_position_embeddings",
    }
    given = {
        ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None
    }
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not rope.keys() <= ROPE_KEYS:
        raise ValueError(f"{path}: the RoPE settings are {repr(rope)[:99]}, which is not supported")
    tied = config.get("tie_word_embeddings") or False
    if tied not in (True, False):
        raise ValueError(f"{path}: tie_word_embeddings is {tied!r}, expected true or false")
    given["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = (
        rope.get("rope_type")
        or rope.get("type")
        or ("missing" if rope.get("factor") else "default")
    )
    if kind == "llama3":
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ):
            if rope.get(key) is None:
                raise ValueError(f"{path}: the RoPE settings say llama3, but have no {key}")
        given |= {
            "use_scaled_rope": True,
            "rope_scaling_from": path.name,
            "rope_scaling_factor": rope.get("factor"),
            "rope_low_freq_factor": rope.get("low_freq_factor"),
            "rope_high_freq_factor": rope.get("high_freq_factor"),
            "rope_original_context": rope.get("original_max_position_embeddings"),
        }
    elif kind != "default":
        raise ValueError(
            f"{path}: rope_type is {kind!r}, which is not supported, only 'default' and 'llama3'"
        )
    return check_params(given, path, names), tied


def open_safetensors(path: Path) -> Weights:
    """The tensors of a .safetensors file by name, on the mapped file: nothing is read or copied yet."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
    except Exception as problem:  # safetensors, torch and the system each have their own
        raise explain(path, "a safetensors file", problem) from None


def open_hugging_face(folder: Path) -> Opened:
    """A folder in Hugging Face's layout."""
    params, tied = hugging_face_params(folder / "config.json")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        where = read_json(index).get("weight_map")
        if (
            not isinstance(where, dict)
            or not all(isinstance(name, str) for name in where.values())
            or not where
        ):
            raise ValueError(f"{index}: no weight_map from tensors to files")
        files = sorted(set(where.values()))
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"{index}: it points to {name!r}, outside the folder")
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder / name}: no such file, but {index.name} names it; is the download complete?"
                )
    else:
        files, where = [single.name], None
    if not (folder / files[0]).is_file():
        others = sorted(
            file.name
            for file in folder.glob("*model*.*")
            if file.suffix in (".bin", ".safetensors")
        )
        raise ValueError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"
            + (f", only {others[0]}, which is not enough or not supported" if others else "")
        )
    tensors: Weights = {}
    for name in files:
        tensors |= {
            key: tensor
            for key, tensor in open_safetensors(folder / name).items()
            if where is None or where.get(key) == name
        }
    for name, file in (where or {}).items():
        if name not in tensors:
            raise ValueError(
                f"{folder / file}: {name} is missing, but {index.name} says that it is here"
            )
    tensors = metas_names(tensors, HUGGING_FACE)
    if tied:
        tensors.pop("output.weight", None)
    elif "output.weight" not in tensors:
        raise ValueError(
            f"{folder}: lm_head.weight is missing, and config.json does not say tie_word_embeddings"
        )
    words = f"Hugging Face layout, {len(files)} safetensors file{'s' * (len(files) > 1)}"
    return (
        params,
        {"the safetensors files": tensors},
        hugging_face_tokenizer(folder),
        rows_in_pairs(params),
        words,
    )


def hugging_face_tokenizer(folder: Path) -> Any:
    """From tokenizer.model, original/tokenizer.model, or tokenizer.json alone, as many mirrors have it."""
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if path.is_file():
            return open_tokenizer(path)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: neither tokenizer.model nor tokenizer.json is there")
    # Byte-level BPE writes each byte as a printable letter: itself, or else the letters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in printable}
    letters |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        model = read_json(path)["model"]
        ranks = {
            bytes(letters[letter] for letter in token): rank
            for token, rank in model["vocab"].items()
        }
        if not all(type(rank) is int for rank in ranks.values()):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not the byte-level BPE tokenizer of a Llama 3") from None
    return llama.make_tokenizer(ranks, path)


# ------------------------------------------------------------------------------------ LLMs-from-scratch


def open_rasbt(path: Path) -> Opened:
    """One of rasbt's llama3.2-*.pth: no params file, so all sizes come from the tensors."""
    tensors = metas_names(checked_pth(path), RASBT)
    try:
        V, D = tensors["tok_embeddings.weight"].shape
        K = 8  # so have all Llama 3
        E = tensors["layers.0.attention.wk.weight"].shape[0] // K
        given = {
            "dim": D,
            "vocab_size": V,
            "n_kv_heads": K,
            "head_dim": E,
            "n_heads": tensors["layers.0.attention.wq.weight"].shape[0] // E,
            "ffn_dim": tensors["layers.0.feed_forward.w1.weight"].shape[0],
            "n_layers": 1
            + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers.")),
            "norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
            "rope_scaling_factor": 32,
            "rope_scaling_from": "LLMs-from-scratch has Llama 3.2",
        }
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        raise ValueError(
            f"{path}: not one of the Llama 3.2 files of LLMs-from-scratch: a tensor is missing or misshapen"
        ) from None
    params, tokenizer = check_params(given, path), open_tokenizer(path.parent / "tokenizer.model")
    return (
        params,
        {path.name: tensors},
        tokenizer,
        rows_in_pairs(params),
        "LLMs-from-scratch layout, 1 file",
    )


# ------------------------------------------------------------------------------------ Llama 2's tokenizer


def sentencepiece_tokenizer(path: Path) -> Any:
    """Llama 2's tokenizer.model, behind those of tiktoken's methods that the script uses."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{path}: a SentencePiece tokenizer, of Llama 2; pip install sentencepiece"
        ) from None
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except Exception as problem:
        raise explain(path, "a SentencePiece tokenizer", problem) from None
    special = {
        "<|begin_of_text|>": model.bos_id(),
        "<|end_of_text|>": model.eos_id(),
        "<|eot_id|>": model.eos_id(),
        "<|eom_id|>": model.eos_id(),
    }

    def encode_single_token(name: str) -> int:
        if name not in special:
            raise ValueError(f"{path}: Llama 2 has no token {name}; its chat format is another")
        return special[name]

    def token_bytes(token: int) -> bytes:
        if model.is_byte(token):
            return bytes([int(model.id_to_piece(token)[3:-1], 16)])
        return (
            b""
            if model.is_control(token)
            else model.id_to_piece(token).replace("\u2581", " ").encode()
        )

    return types.SimpleNamespace(
        n_vocab=model.vocab_size(),
        encode_ordinary=model.encode,
        encode_single_token=encode_single_token,
        decode_single_token_bytes=token_bytes,
        decode=lambda tokens: b"".join(map(token_bytes, tokens)).decode("utf-8", "replace"),
    )


# ------------------------------------------------------------------------------------ which layout is it?


def open_tokenizer(path: Path) -> Any:
    """tokenizer.model of Llama 3 (lines of base64 and rank) or of Llama 2 (SentencePiece)."""
    try:
        if not path.is_file():
            raise OSError
        content = path.read_bytes()
    except OSError as problem:
        raise explain(path, "the tokenizer that comes with the weights", problem) from None
    if b"<unk>" in content[:64]:
        return sentencepiece_tokenizer(path)
    try:
        return llama.load_tokenizer(path)
    except ValueError as problem:
        raise explain(
            path, "lines of base64 and rank", str(problem).removeprefix(f"{path}: ")
        ) from None


def checked_pth(path: Path) -> Weights:
    """open_pth, with a better word on what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # an error is one line, and torch has more to say of odd files
            shard = llama.open_pth(path)
        for name, w in shard.items():
            if w.is_nested:
                raise ValueError(f"{path}: expected a dict of tensors, but {name} is a nested one")
        return shard
    except ValueError as problem:
        said = str(problem).removeprefix(f"{path}: ")
    said = re.sub(r"not a PyTorch checkpoint, or cut short \((.*)\)", r"\1", said, flags=re.S)
    if said.startswith("expected a dict"):
        raise ValueError(f"{path}: {said}")
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


def open_meta(folder: Path) -> Opened:
    """A folder in Meta's layout."""
    count = len(list(folder.glob("consolidated.*.pth"))) or 1
    files = [folder / f"consolidated.{n:02}.pth" for n in range(count)]
    for path in (folder / "params.json", folder / "tokenizer.model", *files):
        if not path.exists():
            raise ValueError(f"{path}: no such file; is the download complete?")
    given = read_json(folder / "params.json")
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    if given.get("vocab_size") == -1:  # Llama 2 leaves it to the tokenizer
        given["vocab_size"] = tokenizer.n_vocab
    if given.get("rope_scaling_factor") is not None:
        given["rope_scaling_from"] = "params.json"
    shards = {path.name: checked_pth(path) for path in files}
    params = check_params(given, folder / "params.json")
    embedding_by_rows(shards, params["vocab_size"])
    words = f"Meta layout, {count} shard{'s' * (count > 1)}"
    return params, shards, tokenizer, None, words


def find_layouts(path: Path) -> dict[str, Callable[[], Opened]]:
    """What is in a folder: a dict from the name of a layout to what opens it."""
    layouts: dict[str, Callable[[], Opened]] = {}
    for folder, name in (
        (path, "Meta's layout"),
        (path / "original", "Meta's layout in original/"),
    ):
        if any(folder.glob("consolidated.*.pth")):
            layouts[name] = functools.partial(open_meta, folder)
    if (path / "config.json").exists() or any(path.glob("model*.safetensors*")):
        layouts["Hugging Face's layout"] = functools.partial(open_hugging_face, path)
    for file in sorted(path.glob("*.pth")):
        if not file.name.startswith("consolidated."):
            layouts[file.name] = functools.partial(open_rasbt, file)
    if not layouts and (path / "params.json").exists():
        layouts["Meta's layout"] = functools.partial(open_meta, path)
    return layouts


def layouts_of_file(file: Path) -> dict[str, Callable[[], Opened]]:
    """The layout that a single file belongs to, as in find_layouts."""
    if re.fullmatch(r"consolidated\.\d\d\.pth|params\.json", file.name):
        return {"Meta's layout": lambda: open_meta(file.parent)}
    if file.suffix == ".pth":
        return {file.name: lambda: open_rasbt(file)}
    if re.fullmatch(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file.name):
        return {"Hugging Face's layout": lambda: open_hugging_face(file.parent)}
    raise ValueError(
        f"{file}: not a file of a checkpoint that can be read; .pth and .safetensors can"
    )


def open_checkpoint(
    path: str | Path, rope_scaling_factor: float | None = None, cache_dir: str | None = None
) -> Opened:
    """Opens what a user points at: a folder in any layout, one file of it, a remote folder. All is checked.

    Returns params, shards (by file name: tensors by Meta's name), tokenizer, what is to be done to each whole
    tensor (or None), and words for the report.
    """
    local = local_copy(path, cache_dir)
    if not local.is_dir() and not local.is_file():
        raise ValueError(f"{path}: no such file or folder")
    layouts = find_layouts(local) if local.is_dir() else layouts_of_file(local)
    if not layouts:
        held = sorted(file.name for file in local.iterdir())
        listed = ", ".join(held[:5]) or "nothing"
        if len(held) > 5:
            listed += " …"
        raise ValueError(
            f"{path}: no checkpoint there: no params.json with consolidated.00.pth, no config.json with "
            f"model.safetensors, no llama3.2-….pth; it holds {listed}"
        )
    taken, *others = layouts
    params, shards, tokenizer, convert, words = layouts[taken]()
    if others:
        words += f" (there is also {', '.join(others)})"
    if rope_scaling_factor:
        if not params["use_scaled_rope"]:
            raise ValueError(
                f"{path}: --rope-scaling-factor is for models with RoPE scaling; this one has none"
            )
        params |= {
            "rope_scaling_factor": rope_scaling_factor,
            "rope_scaling_from": "--rope-scaling-factor",
        }
    check_tensors(shards)
    check_shapes(shards, params)
    if is_tied(next(iter(shards.values()))):
        for shard in shards.values():
            shard.pop("output.weight", None)
    if tokenizer.n_vocab != params["vocab_size"]:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, but vocab_size is "
            f"{params['vocab_size']}; they are of different models"
        )
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
) -> llama.Model:
    """Weights, params and tokenizer of a checkpoint; unless quiet, a line on stderr says what was found.

    n_layers: only the first so many. positions(tokenizer, context): how many the cache will hold; if it and
    the weights take more memory than is free, ValueError, unless force.
    """
    started = time.perf_counter()
    params, shards, tokenizer, convert, words = open_checkpoint(
        path, rope_scaling_factor, cache_dir
    )
    of = params["n_layers"]
    if not 0 < (n_layers or of) <= of:
        raise ValueError(f"{path} has {of} layers, {n_layers} are asked for")
    params = params | {"n_layers": n_layers or of}
    first = next(iter(shards.values()))
    dtype = dtype or first["tok_embeddings.weight"].dtype

    _, N = processes()
    own, shapes = params, llama.weight_shapes(params)
    if N > 1:
        from parts import parallel

        parallel.check_same_model(params, shards, tokenizer)
        own = parallel.share_of_params(params, N)
        shapes = parallel.share_of_shapes(own, N)
        words += f", one of {N} shares"
    tied = "output.weight" not in first
    count = sum(
        math.prod(shape) for name, shape in shapes.items() if not (tied and name == "output.weight")
    )
    if not force:
        room = positions(tokenizer, params["max_seq_len"]) if positions else 0
        check_memory(own, count, device, dtype.itemsize, room)

    def join(name: str, slices: list[Tensor]) -> Tensor:
        w = llama.joined(name, slices)
        return convert(name, w) if convert else w

    if N > 1:
        weights = parallel.load_share(shards, own, device, dtype, convert)
    else:
        weights = llama.load_weights(shards, params, device, dtype, join)
    eager.keep_freed_memory()
    if not quiet:
        where, words = printable(path), printable(words)  # of file names
        print(
            f"{where}: {words}, {n_layers or of} of {of} layers, {count / 1e6:,.1f} M parameters, "
            f"{str(dtype).removeprefix('torch.')}, head {'' if tied else 'not '}tied, "
            f"{count * dtype.itemsize / 1e9:.3g} GB on {device}, {time.perf_counter() - started:.1f} s",
            file=sys.stderr,
        )
    return weights, own, tokenizer
