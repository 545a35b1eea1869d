#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "blobfile==3.3.0", "safetensors==0.8.0"]
# ///
"""Llama 3, one matrix multiplication at a time.

One flat file from Meta's checkpoint (tensors and params.json) to a text. The heart is `forward`.

    python llama3_from_scratch.py "Once upon a time"             a story, and every tensor's shape
    python llama3_from_scratch.py --chat "What do llamas eat?"   a question
    python llama3_from_scratch.py "Hello" --weights ~/Llama3.2-1B             real weights
    python llama3_from_scratch.py "Hello" --view                              look at every tensor
    torchrun --nproc-per-node 8 llama3_from_scratch.py "Hello" --weights ~/Llama3.1-70B    on 8 GPUs

Dimension key, for every docstring; --show checks the letters against the tensors of a pass:
    B batch   T new tokens   S positions they see   D model dim   F feed-forward dim   V vocabulary
    H query heads   K key/value heads   G = H/K query heads that share a key/value head   E head dim
"""

import argparse
import base64
import codecs
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if vars(sys.modules["__main__"]) is globals():  # run, not imported, and not inside a profiler
    sys.modules["llama3_from_scratch"] = sys.modules["__main__"]  # parts/ import this very copy
    if "IPython" not in sys.modules:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch would like to have it
    import torch
import blobfile
import tiktoken
from torch import Tensor
from torch.nn.functional import pad, silu

Weights = dict[str, Tensor]  # tensors by Meta's names
Params = dict[str, Any]  # sizes by the names in Meta's params.json
KeysValues = tuple[Tensor, Tensor]  # B K S E each
Cache = list[KeysValues]  # of each layer
Probe = Callable[[str, str, Tensor], Tensor]  # (name, dims, tensor) to the tensor that flows on
Forward = Callable[..., Tensor]  # forward, or what stands for it: compiled, or with a probe
Model = tuple[Weights, Params, tiktoken.Encoding]
Source = str | Path | Model  # a folder with a model, or one that is loaded
Dtype = torch.dtype | None  # a number format, or that of the file
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HERE = Path(__file__).resolve().parent
TINY = HERE / "weights" / "tiny"
spec = importlib.util.find_spec("parts")  # the package of this name that Python would import
PARTS = spec is not None and Path(str(spec.origin)).resolve().parent == (HERE / "parts").resolve()

# ---------------------------------------------------------------------------------- the checkpoint
# The axis along which Meta cuts a matrix into shards: 0, its rows, or 1, its columns.
SHARD_AXIS = dict.fromkeys("tok_embeddings output wq wk wv w1 w3".split(), 0) | {"wo": 1, "w2": 1}
# What must params.json hold? What stands for what it leaves out? (0: see fill_params, or unused.)
REQUIRED = ("dim", "n_layers", "n_heads", "vocab_size")
DEFAULTS = {
    "n_kv_heads": 0, "head_dim": 0, "ffn_dim": 0, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5, "rope_theta": 10000.0, "use_scaled_rope": False, "rope_scaling_factor": 0.0,
    "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192,
    "max_seq_len": 0, "max_batch_size": 0,
}  # fmt: skip


def fill_params(given: Params, source: object = "params") -> Params:
    """All sizes of a model, from those in its params.json. ValueError for one that makes no sense.

    Source: llama-models, models/llama3/args.py and model.py; the papers of Llama 2 and 3.
    """
    params = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    for key in [*REQUIRED, *params]:
        value: Any = params.get(key, 0)
        default = DEFAULTS.get(key)
        largest = {"n_layers": 1000, "use_scaled_rope": 1}.get(key, 10**12)
        fits = type(value) in (int, type(default)) and (0 < value <= largest or value == default)
        if not fits or key not in (*REQUIRED, *DEFAULTS):
            found = repr(value)[:40] if key in params else "missing"
            raise ValueError(f"{source}: {key} is {found}, which does not make a Llama 3")
    D, H = params["dim"], params["n_heads"]
    # SwiGLU has three matrices where others have two: 2/3 of the usual 4 D units, then rounded up.
    units = int(params["ffn_dim_multiplier"] * int(2 * 4 * D / 3))
    F = math.ceil(units / params["multiple_of"]) * params["multiple_of"]
    # Meta's files hold no RoPE factor. Its code has 8; 3.2 1B and 3B want 32 (llama-models, #241).
    factor = 32 if (D, params["n_layers"]) in ((2048, 16), (3072, 28)) else 8
    context = 131072  # Llama 3.1 and later
    if not params["use_scaled_rope"]:
        context = 8192 if given.get("rope_theta") else 4096  # Llama 3, Llama 2
    derived = {"n_kv_heads": H, "head_dim": D // H, "ffn_dim": F, "rope_scaling_factor": factor}
    derived["max_seq_len"] = context
    return params | {key: params[key] or value for key, value in derived.items()}


def weight_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model with these params, in Meta's names."""
    D, F, V = params["dim"], params["ffn_dim"], params["vocab_size"]
    HE = params["n_heads"] * params["head_dim"]
    KE = params["n_kv_heads"] * params["head_dim"]
    layer = {
        "attention_norm": (D,), "attention.wq": (HE, D), "attention.wk": (KE, D),
        "attention.wv": (KE, D), "attention.wo": (D, HE), "ffn_norm": (D,),
        "feed_forward.w1": (F, D), "feed_forward.w3": (F, D), "feed_forward.w2": (D, F),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, D)}
    for i in range(params["n_layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (D,), "output.weight": (V, D)}


def open_pth(path: Path) -> Weights:
    """The tensors of a .pth file by name. They stay on disk, mapped, unless they are compressed."""
    try:
        packed = any(record.compress_type for record in zipfile.ZipFile(path).infolist())
        shard = torch.load(path, mmap=not packed, weights_only=True, map_location="cpu")
    except Exception as problem:  # torch raises a dozen kinds for a file that is no checkpoint
        said = str(problem).partition(". ")[0]
        raise ValueError(f"{path}: not a PyTorch checkpoint, or cut short ({said})") from None
    wrong = f"{path}: expected a dict of tensors, but"
    if not isinstance(shard, dict) or not all(type(name) is str for name in shard):
        raise ValueError(f"{wrong} the file holds a {type(shard).__name__} without names")
    for name, w in shard.items():
        if not isinstance(w, Tensor):
            raise ValueError(f"{wrong} {name} holds a {type(w).__name__}")
    return shard


def joined(name: str, slices: list[Tensor]) -> Tensor:
    """One tensor from its slices in all shards. Norms are not cut, but whole in each."""
    if len(slices) == 1 or slices[0].dim() == 1:
        return slices[0]
    return torch.cat(slices, SHARD_AXIS.get(name.split(".")[-2], 0))


def load_weights(
    shards: dict[str, Weights], params: Params, device: str, dtype: Dtype, join: Callable = joined
) -> Weights:
    """Whole tensors in Meta's names, from one shard or many. ValueError if one does not fit.

    One by one: memory peaks at the model plus one. What needs no change stays mapped from disk.
    """
    weights: Weights = {}
    for name, shape in weight_shapes(params).items():
        slices = [shard.get(name, torch.empty(0)) for shard in shards.values()]  # empty: missing
        if name == "output.weight" and all(part.numel() == 0 for part in slices):
            slices = [weights["tok_embeddings.weight"]]  # the head is the embedding
        sizes = [tuple(part.shape) for part in slices]
        if len({*sizes}) != 1 or (w := join(name, slices)).shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {sizes} in the shards")
        dtype = dtype or w.dtype  # if none was asked for, the embedding's is everyone's
        weights[name] = w.to(device=device, dtype=dtype)
    return weights


# ----------------------------------------------------------------------------------- the tokenizer
def make_tokenizer(ranks: dict[bytes, int], source: object) -> tiktoken.Encoding:
    """A tiktoken Encoding: these ranks, then the special tokens (Meta's llama3/tokenizer.py)."""
    every_byte = {bytes([b]) for b in range(256)}
    if {*ranks.values()} != {*range(len(ranks))} or not ranks.keys() >= every_byte:
        raise ValueError(f"{source}: not one token for each byte, or rank ({len(ranks)})")
    names = (
        "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
        "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
    ).split()  # numbers 0 to 11; at 1, 8 and 9 a text stops
    names += [f"reserved_special_token_{n}" for n in range(2, 246)]
    tokenizer = tiktoken.Encoding(
        name=str(source),
        mergeable_ranks=ranks,
        special_tokens={f"<|{name}|>": len(ranks) + n for n, name in enumerate(names)},
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
    vars(tokenizer).update(begin=[len(ranks)], end=[], stops=[len(ranks) + n for n in (1, 8, 9)])
    return tokenizer


def load_tokenizer(path: str | Path) -> tiktoken.Encoding:
    """The tokenizer of a tokenizer.model, whose lines are "base64 rank"."""
    with blobfile.BlobFile(str(path), "rb") as file:  # tiktoken's own loader caches by path alone
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f'{path}: line {number} is not "base64 rank": {line[:40]!r}') from None
    return make_tokenizer(ranks, path)


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Token ids of a text, cut as Meta cuts it lest tiktoken crash. "<|eot_id|>" is but text."""
    ids = []
    for part in (text[n : n + 400_000] for n in range(0, len(text), 400_000)):
        cuts = [run.end() for run in re.finditer(r"\S{25000}(?=\S)|\s{25000}(?=\s)", part)]
        for a, b in itertools.pairwise([0, *cuts, len(part)]):
            ids += tokenizer.encode_ordinary(part[a:b])
    return ids


def special(tokenizer: tiktoken.Encoding, name: str) -> int:
    """The id of a special token, such as "begin_of_text"."""
    return tokenizer.encode_single_token(f"<|{name}|>")


def stop_ids(tokenizer: tiktoken.Encoding) -> list[int]:
    """The tokens that end a text: end_of_text, eom_id and eot_id are Llama 3's own."""
    return vars(tokenizer)["stops"]


# ---------------------------------------------------------------------------- the heart: the model
def project(x: Tensor, w: Tensor) -> Tensor:
    """x (B T D) times a matrix: w (F D) gives B T F; w (H E D), one per head, gives B H T E."""
    y = x @ w.flatten(0, -2).T  # all heads at once: (H E D), seen as (HE D); (F D) stays as it is
    if w.dim() == 3:
        y = y.unflatten(-1, w.shape[:2]).transpose(1, 2)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (… D) divided by its root mean square, times weight (D). (Zhang and Sennrich 2019.)"""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight  # as Meta does: cast after the product, bfloat16 would differ


def rope_turns(positions: Tensor, params: Params) -> Tensor:
    """How far is each pair turned at positions (B T)? As complex64 (B 1 T E/2) of length 1.

    Pair 0 turns by a radian a position, each next one more slowly (RoFormer, Su et al. 2021). From
    3.1 on, pairs of less than 4 turns in 8,192 positions are slowed down (llama-models, model.py).
    """
    E = params["head_dim"]
    evens = torch.arange(0, E, 2, device=positions.device).float()  # each pair's first number
    freqs = 1.0 / params["rope_theta"] ** (evens / E)  # radians a position
    if params["use_scaled_rope"]:
        low, high = params["rope_low_freq_factor"], params["rope_high_freq_factor"]
        full_turns = params["rope_original_context"] / (2 * math.pi / freqs)
        keep = ((full_turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - keep) * freqs / params["rope_scaling_factor"] + keep * freqs
    angles = positions[:, None, :, None].float() * freqs
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Each pair of neighbours in x (B H T E), as a complex number, turned by turns (B 1 T E/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def causal_mask(positions: Tensor, cache: Cache | None, dtype: torch.dtype) -> Tensor:
    """0 where a token may look, -inf at later ones (B 1 T S). In a cache, slot n is position n."""
    keys_at = positions
    if cache is not None:
        keys_at = torch.arange(cache[0][0].shape[2], device=positions.device)[None]  # 1 S
    later = keys_at[:, None, None, :] > positions[:, None, :, None]
    return torch.where(later, -math.inf, 0.0).to(dtype)


def remember(layer: KeysValues, k: Tensor, v: Tensor, positions: Tensor) -> KeysValues:
    """Puts k and v (B K T E) into a layer's cache; gives all keys and values there (B K S E)."""
    keys, values = layer
    rows = torch.arange(len(k), device=k.device)[:, None]  # B 1: with positions, B T places
    keys[rows, :, positions] = k.transpose(1, 2)  # around a ":" both come first: B T K E
    values[rows, :, positions] = v.transpose(1, 2)
    return keys, values


def forward(
    tokens: Tensor,
    weights: Weights,
    params: Params,
    cache: Cache | None = None,
    positions: Tensor | None = None,
    last: Tensor | None = None,
    probe: Probe = lambda name, dims, tensor: tensor,
    project: Callable[[Tensor, Tensor], Tensor] = project,
) -> Tensor:
    """Llama 3: token ids (B T) to float32 logits (B T V), or (B 1 V), of token last[b] in row b.

    positions (B T or 1 T; None: 0 … T-1). cache: of earlier tokens, these are added. probe gives
    what flows on, project multiplies. Source: llama-models, models/llama3/model.py.
    """
    tokens = probe("tokens", "B T", tokens)
    B, T = tokens.shape
    H, K, E = params["n_heads"], params["n_kv_heads"], params["head_dim"]
    G = H // K
    if positions is None:
        positions = torch.arange(T, device=tokens.device)[None]
    turns = rope_turns(positions, params)
    x = probe("tok_embeddings", "B T D", weights["tok_embeddings.weight"][tokens])
    mask = causal_mask(positions, cache, x.dtype)
    for i in range(params["n_layers"]):
        # Attention. What does each token ask, what does it offer, what does it give? In each head.
        h = rms_norm(x, weights[f"layers.{i}.attention_norm.weight"], params["norm_eps"])
        h = probe(f"layers.{i}.attention_norm", "B T D", h)
        q = project(h, weights[f"layers.{i}.attention.wq.weight"].view(H, E, -1))
        q = probe(f"layers.{i}.attention.q", "B H T E", q)
        k = project(h, weights[f"layers.{i}.attention.wk.weight"].view(K, E, -1))
        k = probe(f"layers.{i}.attention.k", "B K T E", k)
        v = project(h, weights[f"layers.{i}.attention.wv.weight"].view(K, E, -1))
        v = probe(f"layers.{i}.attention.v", "B K T E", v)

        # Where does a token stand? Once q and k are turned by it, q · k depends on their distance.
        q = probe(f"layers.{i}.attention.q_rotated", "B H T E", rotate(q, turns))
        k = probe(f"layers.{i}.attention.k_rotated", "B K T E", rotate(k, turns))
        if cache is not None:
            k, v = remember(cache[i], k, v, positions)  # from here on those of all S positions

        # How well does each key answer each query? What do the keys that answer well have to give?
        scores = q.reshape(B, K, G * T, E) @ k.mT  # the G heads that share keys: one matrix
        scores = scores.view(B, H, T, -1) / E**0.5
        scores = probe(f"layers.{i}.attention.scores", "B H T S", scores + mask)
        probs = probe(f"layers.{i}.attention.probs", "B H T S", scores.softmax(-1))
        heads = probs.reshape(B, K, G * T, -1) @ v
        heads = probe(f"layers.{i}.attention.heads", "B H T E", heads.view(B, H, T, E))
        out = project(heads.transpose(1, 2).flatten(2), weights[f"layers.{i}.attention.wo.weight"])
        out = probe(f"layers.{i}.attention.out", "B T D", out)
        x = probe(f"layers.{i}.after_attention", "B T D", x + out)

        # Feed-forward. What does each token make of what it read? The gate says how much passes.
        h = rms_norm(x, weights[f"layers.{i}.ffn_norm.weight"], params["norm_eps"])
        h = probe(f"layers.{i}.ffn_norm", "B T D", h)
        gate = silu(project(h, weights[f"layers.{i}.feed_forward.w1.weight"]))
        gate = probe(f"layers.{i}.feed_forward.gate", "B T F", gate)
        up = project(h, weights[f"layers.{i}.feed_forward.w3.weight"])
        up = probe(f"layers.{i}.feed_forward.up", "B T F", up)
        hidden = probe(f"layers.{i}.feed_forward.hidden", "B T F", gate * up)
        out = project(hidden, weights[f"layers.{i}.feed_forward.w2.weight"])
        out = probe(f"layers.{i}.feed_forward.out", "B T D", out)
        x = probe(f"layers.{i}.out", "B T D", x + out)

    # Which token comes next? To go on writing, only the last token of each row needs to say.
    asked = "B T" if last is None else "B 1"
    x = x if last is None else x[torch.arange(B, device=x.device), last][:, None]
    h = probe("norm", f"{asked} D", rms_norm(x, weights["norm.weight"], params["norm_eps"]))
    logits = probe("logits", f"{asked} V", project(h, weights["output.weight"]).float())
    return logits


# ----------------------------------------------------------------------------- sample and generate
def make_cache(weights: Weights, params: Params, B: int, S: int = 0) -> Cache:
    """Room for S positions: each layer's keys and values (B K S E), zeros in the weights' dtype."""
    like = weights["norm.weight"]
    shape = (B, params["n_kv_heads"], S, params["head_dim"])
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(params["n_layers"])]


def grow(cache: Cache, S: int) -> None:
    """Makes room for at least S positions: zeros behind what is there. This copies the cache."""
    for i, (keys, values) in enumerate(cache):
        more = S - keys.shape[2]
        if more > 0:
            cache[i] = pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more))


def chunk_size(seen: int, params: Params, on_cpu: bool) -> int:
    """How many tokens to read at once? As many as are fast, unless scores (H T S) get too large."""
    fast, most_scores = (512, 2**25) if on_cpu else (4096, 2**28)
    return min(fast, max(32, most_scores // (params["n_heads"] * (seen + fast))))


@torch.no_grad()
def prefill(
    tokens: Tensor,
    weights: Weights,
    params: Params,
    cache: Cache,
    start: int = 0,
    lengths: Tensor | None = None,
    read: Forward | None = None,
    chunk: int = 0,  # tokens at once; 0: as chunk_size says
    watched: Forward | None = None,
) -> Tensor:
    """Reads tokens (B T) into the cache, from position start on: logits (B 1 V) of each row's last.

    lengths (B): how many of a row's tokens count. read, or watched in the last chunk: as forward.
    """
    B, T = tokens.shape
    ends = torch.full((B,), T, device=tokens.device) if lengths is None else lengths
    logits = torch.zeros(())  # of no row yet
    a = 0
    while a < T:
        size = chunk or chunk_size(start + a, params, tokens.is_cpu)
        b = min(T, a + max(1, size // B))  # shared by the B rows
        grow(cache, start + b)
        views = [(keys[:, :, : start + b], values[:, :, : start + b]) for keys, values in cache]
        positions = torch.arange(start + a, start + b, device=tokens.device)[None]
        last = (ends - 1 - a).clamp(0, b - a - 1)
        run = (b == T and watched) or read or forward  # watched: for the last chunk alone
        chunk_logits = run(tokens[:, a:b], weights, params, views, positions, last)
        logits = torch.where(ends[:, None, None] > a, chunk_logits, logits)  # ended rows: as before
        a = b
    return logits


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids (B) from logits (B V): the likeliest, or drawn from softmax(logits / temperature).

    top_k leaves the k likeliest, top_p the fewest that together reach it (Holtzman et al. 2020).
    """
    if temperature < 1e-30:  # 0, or too small for float32 to divide by
        return logits.argmax(-1)
    logits, ids = logits.sort(descending=True, stable=True)
    if top_k > 0:
        logits = logits[:, :top_k]
    probs = ((logits - logits[:, :1]) / temperature).softmax(-1)  # none above 0: no overflow
    if top_p < 1:
        likelier = probs.cumsum(-1) - probs  # the probability of all that is likelier
        probs = probs.masked_fill((likelier >= top_p) & (likelier > 0), 0)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return ids.gather(-1, drawn)[:, 0]


@torch.no_grad()
def generate(
    logits: Tensor,
    weights: Weights,
    params: Params,
    cache: Cache,
    positions: Tensor,
    choose: Callable[[Tensor], Tensor] = sample,
    step: Forward | None = None,
) -> Iterator[Tensor]:
    """Yields token ids (B), one after another for each row, until a row has filled the context.

    logits (B 1 V): of prefill. positions (B): each row's first free one. step: stands for forward.
    """
    if step is None and PARTS:
        from parts.eager import forward as step
    step = step or forward
    last = torch.zeros_like(positions)  # a step reads one token of each row: number 0
    for S in range(int(positions.max()) + 1, params["max_seq_len"] + 1):
        tokens = choose(logits[:, -1, : params.get("n_tokens")])  # the table may have more rows
        yield tokens
        if S > cache[0][0].shape[2]:  # with room to spare, since this copies the cache
            grow(cache, min(S + (127 if tokens.is_cpu else 511), params["max_seq_len"]))
        logits = step(tokens[:, None], weights, params, cache, positions[:, None], last)
        positions = positions + 1


# ---------------------------------------------------------------------- looking inside: the probes
def check_dims(sizes: dict[str, int], name: str, dims: str, tensor: Tensor) -> None:
    """ValueError if a shape contradicts dims ("B H T E") and sizes; new letters join sizes."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: a probe returned {tensor!r}, not the tensor that is to flow on")
    letters = dims.split()
    shape = list(tensor.shape)
    for letter, size in zip(letters, shape):
        sizes.setdefault(letter, int(letter) if letter.isdigit() else size)
    if [sizes.get(letter) for letter in letters] != shape:
        raise ValueError(f"{name} should be {dims} with {sizes}, but its shape is {shape}")


def show_shapes(which: str, n_layers: int) -> Probe:
    """A probe for one pass that prints its steps: those of "all" layers, or of the "first"."""
    sizes: dict[str, int] = {}

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        check_dims(sizes, name, dims, tensor)
        if which == "all" or name.startswith("layers.0.") or not name.startswith("layers."):
            print(f"{name:<32} {dims:<8} {tensor.dtype!s:<15}", *tensor.shape, file=sys.stderr)
        elif name == "layers.1.attention_norm":
            print(f"and the same in the other {n_layers - 1} layers", file=sys.stderr)
        return tensor

    return probe


# ------------------------------------------------------------------------- from a folder to a text
def load_model(
    path: str | Path = TINY, device: str = "cpu", dtype: str | Dtype = None, **options: Any
) -> Model:
    """Weights, params and tokenizer of a folder. ValueError, in one line, for what is not right.

    With parts/, in any layout (more options: load_model in parts/layouts.py); without, in Meta's.
    """
    dtype = getattr(torch, str(dtype), dtype)  # "float32" is torch.float32
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype {dtype!r}: expected float32, bfloat16 or float16")
    if PARTS:
        from parts import layouts

        return layouts.load_model(path, device, dtype, **options)
    folder = Path(path).expanduser()
    sizes = folder / "params.json"
    try:
        given = {**json.loads(sizes.read_text(encoding="utf-8-sig"))}
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{sizes}: not a JSON object ({problem})") from None
    params = fill_params(given, sizes)
    factor = options.get("rope_scaling_factor") or params["rope_scaling_factor"]
    factor = factor * params["use_scaled_rope"]  # 0: not scaled
    params["rope_scaling_factor"] = factor
    count = max(1, len(list(folder.glob("consolidated.??.pth"))))
    shards = {f"{n}": open_pth(folder / f"consolidated.{n:02}.pth") for n in range(count)}
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    shapes = {*weight_shapes(params), "rope.freqs"}  # that one is Llama 2's, and not needed
    for name, w in itertools.chain(*(shard.items() for shard in shards.values())):
        if name not in shapes or w.dtype not in FLOATS or w.is_sparse or w.is_meta or w.is_nested:
            raise ValueError(f"{path}: {name} ({w.dtype}, {w.layout}) is not of such a model")
    if tokenizer.n_vocab != params["vocab_size"]:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, another model's")
    weights = load_weights(shards, params, device, dtype)
    if not options.get("quiet"):
        print(f"{path}: Meta layout, {count} shards, RoPE scaling {factor:g}", file=sys.stderr)
    return weights, params, tokenizer


def text_of(steps: Iterable[Tensor], tokenizer: tiktoken.Encoding, new: list[int]) -> Iterator[str]:
    """Yields the text of one row's tokens, up to a stop token. The ids are put into `new`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may have several tokens
    for tokens in steps:
        new.append(int(tokens))
        if new[-1] in stop_ids(tokenizer):
            break
        yield decoder.decode(tokenizer.decode_single_token_bytes(new[-1]))
    yield decoder.decode(b"", final=True)


def stream(
    prompt: str | list[int], weights: Source = TINY, max_new_tokens: int = 100, **options: Any
) -> Iterator[str]:
    """Yields the text that goes on from a prompt, piece by piece.

    prompt: a text or ids. options: seed, probe (of the prompt's last chunk), and those of sample.
    """
    model = weights if isinstance(weights, tuple) else load_model(weights, quiet=True)
    tensors, params, tokenizer = model
    device = tensors["norm.weight"].device
    if isinstance(prompt, str):
        prompt = [*vars(tokenizer)["begin"], *encode(tokenizer, prompt), *vars(tokenizer)["end"]]
    if not 0 < len(prompt) <= params["max_seq_len"]:
        raise ValueError(f"prompt of {len(prompt)} tokens, not 1 to {params['max_seq_len']}")
    watched = functools.partial(forward, probe=options.pop("probe", lambda name, dims, x: x))
    generator = torch.Generator(device).manual_seed(options.pop("seed", 0) or 0)
    options.setdefault("generator", generator)
    cache = make_cache(tensors, params, B=1)
    logits = prefill(torch.tensor([prompt], device=device), tensors, params, cache, watched=watched)
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: the weights are damaged, or dtype too small")
    at = torch.tensor([len(prompt)], device=device)
    steps = generate(logits, tensors, params, cache, at, functools.partial(sample, **options))
    yield from text_of(itertools.islice(steps, max_new_tokens), tokenizer, [])


def complete(prompt: str | list[int], *how: Any, **options: Any) -> str:
    """The text that goes on from a prompt; how and options are those of stream."""
    return "".join(stream(prompt, *how, **options))


def main(argv: list[str] | None = None) -> int:
    """The command line: that of parts/, with all its flags, or a small one where there is none."""
    if PARTS:
        from parts import commandline

        return commandline.main(argv)
    flags = {"prompt": str, "--weights": str, "--max-new-tokens": int, "--temperature": float}
    flags |= {"--top-k": int, "--top-p": float, "--seed": int, "--rope-scaling-factor": float}
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for flag, kind in flags.items():
        parser.add_argument(flag, type=kind)
    args = vars(parser.parse_args(argv))
    try:
        factor = args.pop("rope_scaling_factor", None)
        model = load_model(args.pop("weights", TINY), rope_scaling_factor=factor)
        shapes = show_shapes("first", model[1]["n_layers"])
        for piece in itertools.chain(stream(args.pop("prompt"), model, probe=shapes, **args), "\n"):
            print(piece, end="", flush=True)
    except BrokenPipeError:  # whoever read the text has gone
        os._exit(0)
    except (ValueError, OSError, MemoryError, RuntimeError) as problem:
        said = re.sub(r"^\[Errno \d+\] ", "", str(problem)[:999])
        print("error:", re.sub(r"[^\w\s!-~]|[^\S ]", "?", said), file=sys.stderr)
        return 2
    return 0


__all__ = [name for name, it in globals().items() if getattr(it, "__module__", "") == __name__]

if __name__ == "__main__":
    sys.exit(main())
