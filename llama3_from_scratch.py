#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "blobfile==3.3.0", "safetensors==0.8.0"]
# ///
"""Llama 3, one matrix multiplication at a time.

One flat file that takes Meta's checkpoint (a dict of tensors and params.json) from a prompt to text. Read it
top to bottom; the heart is `forward`. The code you read is the code that runs and the code that is tested.

    python llama3_from_scratch.py "Once upon a time"                       a story, and every tensor's shape
    python llama3_from_scratch.py --chat "What do llamas eat?"             a question
    python llama3_from_scratch.py --chat --system "Be brief."              a conversation
    python llama3_from_scratch.py --prompts - < questions.txt              many prompts at once, JSON out
    python llama3_from_scratch.py "Once" --temperature 0.8 --top-p 0.9 --seed 1
    python llama3_from_scratch.py "Hello" --weights ~/Llama3.2-1B          real weights, in any layout
    python llama3_from_scratch.py "Hello" --weights ~/Llama3.2-1B --compile      faster, once it is compiled
    python llama3_from_scratch.py "Hello" --break-at "layers.0.*.scores"   stop in forward, in the debugger
    python llama3_from_scratch.py "Hello" --save-trace t.safetensors       every tensor of the pass, in a file
    torchrun --nproc-per-node 8 llama3_from_scratch.py "Hello" --weights ~/Llama3.1-70B          on 8 GPUs

Dimension key, for every docstring; whenever a pass is probed its letters are checked against the real sizes:
    B batch   T new tokens   S positions they can see   D model dim   F feed-forward dim   V vocabulary
    H query heads   K key/value heads   G = H/K query heads that share a key/value head   E head dim
"""
import argparse
import base64
import bdb
import codecs
import functools
import importlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":  # the next imports take a second, in which Ctrl-C should be as quiet as later
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch would like it, we do not need it
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux: tensors on huge pages, faster to allocate
import blobfile
import tiktoken
import torch
from torch.nn.functional import pad, silu

# ------------------------------------------------------------------------ the checkpoint

def fill_params(given):
    """The sizes of a model: what params.json gives, and where it is silent what Meta's code supplies.

    Source: llama-models, models/llama3/args.py and model.py; for max_seq_len the papers of 3.1, 3 and 2.
    """
    D, H = given["dim"], given["n_heads"]
    scaled, unit = given.get("use_scaled_rope") or False, given.get("multiple_of") or 256
    F = int((given.get("ffn_dim_multiplier") or 1) * int(2 * 4 * D / 3))  # SwiGLU has 3 matrices, not 2
    # No release stores its RoPE factor. Meta's code has 8, but 3.2 1B and 3B want 32 (llama-models #241).
    factor = 32 if (D, given["n_layers"]) in ((2048, 16), (3072, 28)) else 8
    supplied = {"n_kv_heads": H, "head_dim": D // H, "ffn_dim": math.ceil(F / unit) * unit, "norm_eps": 1e-5,
                "rope_theta": 10000.0, "use_scaled_rope": scaled, "rope_scaling_factor": factor,
                "rope_low_freq_factor": 1, "rope_high_freq_factor": 4, "rope_original_context": 8192,
                "max_seq_len": 131072 if scaled else 8192 if "rope_theta" in given else 4096}
    return supplied | {key: value for key, value in given.items() if value is not None}


def read_params(folder):
    """fill_params of a folder's params.json. Raises ValueError, in one line, if the file makes no sense."""
    path = Path(folder) / "params.json"
    try:
        return fill_params(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, ArithmeticError) as problem:
        raise ValueError(f"{path}: not the sizes of a Llama ({problem!r})") from None


def weight_shapes(params):
    """The name and shape of every tensor of a model with these params, in Meta's names."""
    D, F, V, E = (params[key] for key in ("dim", "ffn_dim", "vocab_size", "head_dim"))
    HE, KE = params["n_heads"] * E, params["n_kv_heads"] * E
    layer = {"attention_norm": (D,), "attention.wq": (HE, D), "attention.wk": (KE, D),
             "attention.wv": (KE, D), "attention.wo": (D, HE), "ffn_norm": (D,),
             "feed_forward.w1": (F, D), "feed_forward.w3": (F, D), "feed_forward.w2": (D, F)}
    layers = {f"layers.{i}.{name}.weight": layer[name] for i in range(params["n_layers"]) for name in layer}
    return {"tok_embeddings.weight": (V, D), **layers, "norm.weight": (D,), "output.weight": (V, D)}


def open_pth(path):
    """The tensors of a .pth file by name. They stay on disk, mapped, until they are read."""
    try:
        shard = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception as problem:  # torch raises a dozen kinds for a file that is no checkpoint
        raise ValueError(f"{path}: not a PyTorch checkpoint ({str(problem).partition('. ')[0]})") from None
    for name, w in shard.items() if isinstance(shard, dict) else [("the file", shard)]:
        if not isinstance(w, torch.Tensor):
            raise ValueError(f"{path}: expected a dict of tensors, but {name} holds a {type(w).__name__}")
    return shard


def meta_files(folder):
    """The paths of all shards of a folder in Meta's layout, none left out."""
    count = len(list(folder.glob("consolidated.*.pth"))) or 1
    paths = [folder / f"consolidated.{n:02}.pth" for n in range(count)]
    for path in (folder / "params.json", folder / "tokenizer.model", *paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file; is the download complete?")
    return paths


def is_tied(shard):
    """Is the head the embedding? Meta's 3.2 files hold it as the same memory, other people's not at all."""
    head, embedding = shard.get("output.weight"), shard.get("tok_embeddings.weight")
    return head is None or embedding is not None and head.data_ptr() == embedding.data_ptr()


def load_weights(shards, params, device="cpu", dtype=None, convert=None, n_layers=None):
    """One dict of whole tensors in Meta's names from one shard or many; n_layers: only of the first layers.

    One shard in its own dtype on the CPU is used straight from the mapped file. Else tensor after tensor is
    joined, converted (by `convert`, which another layout may bring, and to dtype) and moved, so that memory
    peaks at the model plus one tensor. Raises ValueError for a tensor that is missing or has another shape.
    """
    weights, first = {}, next(iter(shards.values()))
    for name, shape in weight_shapes(params | {"n_layers": n_layers or params["n_layers"]}).items():
        if name == "output.weight" and is_tied(first):
            weights[name] = weights["tok_embeddings.weight"]
            continue
        slices = [shard.get(name, torch.empty(0)) for shard in shards.values()]  # Meta cuts rows or columns
        cut = [d for d, sizes in enumerate(zip(slices[0].shape, shape)) if len(set(sizes)) > 1]
        found = [size * (len(slices) if d in cut[:1] else 1) for d, size in enumerate(slices[0].shape)]
        if tuple(found) != shape or any(w.shape != slices[0].shape for w in slices):
            raise ValueError(f"{name}: expected shape {shape}, found {[tuple(w.shape) for w in slices]}; are "
                             "all shards there, do they and the params belong together?")
        w = torch.cat(slices, cut[0]) if cut else slices[0]
        kind = dtype or first["tok_embeddings.weight"].dtype
        weights[name] = (convert(name, w) if convert else w).to(device=device, dtype=kind)
    return weights


# ------------------------------------------------------------------------ the tokenizer and the chat format

def make_tokenizer(ranks, source):
    """A tiktoken Encoding from ranks (each token's bytes to its rank), with Llama 3's 256 special tokens.

    They follow the ranks. Source of these and of the pattern: llama-models, models/llama3/tokenizer.py.
    """
    if {*ranks.values()} != {*range(len(ranks))} or not ranks.keys() >= {bytes([b]) for b in range(256)}:
        raise ValueError(f"{source}: {len(ranks)} tokens, but not one for each byte or not one for each rank")
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
             "python_tag", "image", *(f"reserved_special_token_{n}" for n in range(2, 246))]
    return tiktoken.Encoding(
        name=str(source), mergeable_ranks=ranks,
        special_tokens={f"<|{name}|>": len(ranks) + n for n, name in enumerate(names)},
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def load_tokenizer(path):
    """The tokenizer of a tokenizer.model, whose lines are "base64 rank"."""
    ranks = {}  # read here: tiktoken's own loader caches by path, and can hand out another folder's file
    with blobfile.BlobFile(str(path), "rb") as file:
        for number, line in enumerate(file.read().splitlines(), 1):
            try:
                token, rank = line.split()
                if ranks.setdefault(base64.b64decode(token, validate=True), int(rank)) != int(rank):
                    raise ValueError
            except ValueError:
                raise ValueError(f'{path}: line {number} is not "base64 rank": {line[:40]!r}') from None
    return make_tokenizer(ranks, path)


def encode(tokenizer, text):
    """Token ids of a text. Nothing in it becomes a special token, whatever it spells.

    tiktoken can crash on long texts: they are cut where Meta's tokenizer cuts them, every 400,000 characters
    and after 25,000 characters in a row without a space, or of space alone.
    """
    ids = []
    for start in range(0, len(text), 400_000):
        part = text[start : start + 400_000]
        runs = [found.span() for found in re.finditer(r"\S+|\s+", part)]
        cuts = [n for begin, end in runs for n in range(begin + 25_000, end, 25_000)]
        for a, b in itertools.pairwise([0, *cuts, len(part)]):
            ids += tokenizer.encode_ordinary(part[a:b])
    return ids


def special(tokenizer, name):
    return tokenizer.encode_single_token(f"<|{name}|>")


def chat_message(tokenizer, role, text=None):
    """A message of a conversation as token ids, open if the text is yet to come.

    <|start_header_id|>role<|end_header_id|>, empty line, text, <|eot_id|> (Meta's llama3/chat_format.py).
    """
    header = [special(tokenizer, "start_header_id"), *encode(tokenizer, role),
              special(tokenizer, "end_header_id"), *encode(tokenizer, "\n\n")]
    return header if text is None else [*header, *encode(tokenizer, text), special(tokenizer, "eot_id")]


# ------------------------------------------------------------------------ where several processes meet

def processes():
    """(rank, N): which of how many this is. One alone, unless torchrun has started more."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def summed(x):
    """The sum of x over all processes. Nothing else in this file goes from one to another."""
    if processes()[1] > 1:
        torch.distributed.all_reduce(x)
    return x


def embed(tokens, table):
    """Rows of the embedding matrix for token ids, B T to B T D. Each of N processes holds V/N of them."""
    rank, N = processes()
    if N == 1:
        return table[tokens]
    row = tokens - rank * len(table)
    here = (row >= 0) & (row < len(table))  # else another process has the row, and this one adds zeros
    return summed(torch.where(here[..., None], table[row.clamp(0, len(table) - 1)], 0))


def joined(x):
    """What N processes hold of the last dim, side by side: B T V/N to B T V."""
    (rank, N), width = processes(), x.shape[-1]
    return summed(pad(x, (rank * width, (N - 1 - rank) * width))) if N > 1 else x


# ------------------------------------------------------------------------ the heart: the model

def project(x, w):
    """x (B T D) times a matrix: w (F D) gives B T F; w (H E D), one matrix per head, gives B H T E.

    The heads' matrices stand one below the other in memory, so one matrix multiplication does all heads.
    """
    # Is it one token? In bfloat16 PyTorch's own product reads weights faster than oneDNN's, made for many.
    if x.shape[:2] == (1, 1) and torch.backends.mkldnn.enabled and not torch.compiler.is_compiling():
        try:
            torch.backends.mkldnn.enabled = False
            y = x @ w.flatten(0, -2).T
        finally:
            torch.backends.mkldnn.enabled = True
    else:
        y = x @ w.flatten(0, -2).T
    return y if w.dim() == 2 else y.unflatten(-1, w.shape[:2]).transpose(1, 2)


def rms_norm(x, weight, eps):
    """x (… D) divided by its root mean square, times weight (D). RMSNorm: Zhang and Sennrich 2019."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight  # Meta casts before the weight, not after: in bfloat16 the result differs


def rope_turns(positions, params):
    """How far is each pair turned at each position? (B T) to complex64 (B 1 T E/2) of length 1.

    Pair 0 turns by one radian a position, each next pair more slowly (RoFormer, Su et al. 2021). From 3.1 on,
    a pair with less than one turn in Llama 3's 8,192 positions is slowed down by a factor, one with more than
    four is left alone, with a blend between (llama-models, models/llama3/model.py). Always float32.
    """
    E, theta = params["head_dim"], params["rope_theta"]
    freqs = 1.0 / theta ** (torch.arange(0, E, 2, device=positions.device).float() / E)  # radians a position
    if params["use_scaled_rope"]:
        low, high = params["rope_low_freq_factor"], params["rope_high_freq_factor"]
        turns = params["rope_original_context"] / (2 * math.pi / freqs)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - keep) * freqs / params["rope_scaling_factor"] + keep * freqs
    angles = positions[:, None, :, None].float() * freqs
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, turns):
    """Turns each pair of neighbours in x (B H T E), taken as a complex number, by turns (B 1 T E/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def forward(tokens, weights, params, cache=None, positions=None, last=None,
            probe=lambda name, dims, tensor: tensor):
    """Llama 3: token ids (B T) to logits (B T V), or of one token a row, `last` (B), to (B 1 V); float32.

    weights: a dict in Meta's names and layout. params: from fill_params. positions (B T, or 1 T for all
    rows): where the tokens stand, else 0 … T-1. cache (from make_cache): keys and values of earlier tokens at
    S positions; the new ones' are written into it. Without one, S = T. probe(name, dims, tensor) sees each
    step's result, and what it returns flows on. Source: llama-models, models/llama3/model.py.
    """
    (B, T), E, eps = tokens.shape, params["head_dim"], params["norm_eps"]
    H, K, G = params["n_heads"], params["n_kv_heads"], params["n_heads"] // params["n_kv_heads"]
    if positions is None:
        positions = torch.arange(T, device=tokens.device)[None]
    slots = positions if cache is None else torch.arange(cache[0][0].shape[2], device=tokens.device)[None]
    mask = torch.where(slots[:, None, None] > positions[:, None, :, None], -math.inf, 0.0)  # B 1 T S
    turns, rows = rope_turns(positions, params), torch.arange(B, device=tokens.device)[:, None]

    tokens = probe("tokens", "B T", tokens)
    x = probe("tok_embeddings", "B T D", embed(tokens, weights["tok_embeddings.weight"]))
    for i in range(params["n_layers"]):
        # Attention. What does each token ask, what does it offer, what does it give? Each head has its own.
        h = rms_norm(x, weights[f"layers.{i}.attention_norm.weight"], eps)
        h = probe(f"layers.{i}.attention_norm", "B T D", h)
        q = project(h, weights[f"layers.{i}.attention.wq.weight"].view(H, E, -1))
        q = probe(f"layers.{i}.attention.q", "B H T E", q)
        k = project(h, weights[f"layers.{i}.attention.wk.weight"].view(K, E, -1))
        k = probe(f"layers.{i}.attention.k", "B K T E", k)
        v = project(h, weights[f"layers.{i}.attention.wv.weight"].view(K, E, -1))
        v = probe(f"layers.{i}.attention.v", "B K T E", v)

        # Where does it stand? With each turned by its position, q · k depends on their distance alone.
        q = probe(f"layers.{i}.attention.q_rotated", "B H T E", rotate(q, turns))
        k = probe(f"layers.{i}.attention.k_rotated", "B K T E", rotate(k, turns))
        if cache is not None:  # then k and v are from here on those of all S positions: B K S E
            keys, values = cache[i]
            keys[rows, :, positions], values[rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
            k, v = keys, values

        # How well does each key answer each query? The G heads that share keys form one matrix: no copies.
        # The mask puts -inf on what comes later. (In place: scores can be large. Softmax works in float32.)
        scores = (q.reshape(B, K, G * T, E) @ k.mT).view(B, H, T, -1).div_(E**0.5).add_(mask.to(q.dtype))
        scores = probe(f"layers.{i}.attention.scores", "B H T S", scores)
        probs = probe(f"layers.{i}.attention.probs", "B H T S", scores.softmax(-1))
        heads = (probs.reshape(B, K, G * T, -1) @ v).view(B, H, T, E)
        heads = probe(f"layers.{i}.attention.heads", "B H T E", heads)
        out = summed(project(heads.transpose(1, 2).flatten(2), weights[f"layers.{i}.attention.wo.weight"]))
        out = probe(f"layers.{i}.attention.out", "B T D", out)
        x = probe(f"layers.{i}.after_attention", "B T D", x + out)

        # Feed-forward. What does each token make of what it read? The gate says how much of each unit passes.
        h = rms_norm(x, weights[f"layers.{i}.ffn_norm.weight"], eps)
        h = probe(f"layers.{i}.ffn_norm", "B T D", h)
        gate = silu(project(h, weights[f"layers.{i}.feed_forward.w1.weight"]))
        gate = probe(f"layers.{i}.feed_forward.gate", "B T F", gate)
        up = project(h, weights[f"layers.{i}.feed_forward.w3.weight"])
        up = probe(f"layers.{i}.feed_forward.up", "B T F", up)
        hidden = probe(f"layers.{i}.feed_forward.hidden", "B T F", gate * up)
        out = summed(project(hidden, weights[f"layers.{i}.feed_forward.w2.weight"]))
        out = probe(f"layers.{i}.feed_forward.out", "B T D", out)
        x = probe(f"layers.{i}.out", "B T D", x + out)

    # Which token comes next? To go on writing, only the last token of each row needs to say.
    x, asked = (x, "B T") if last is None else (x[rows, last[:, None]], "B 1")
    h = probe("norm", f"{asked} D", rms_norm(x, weights["norm.weight"], eps))
    logits = probe("logits", f"{asked} V", joined(project(h, weights["output.weight"]).float()))
    return logits


# ------------------------------------------------------------------------ sample and generate

def make_cache(weights, params, B, S=0):
    """Room for S positions: a pair (keys, values) of zeros (B K S E) a layer, in the weights' dtype."""
    like, shape = weights["norm.weight"], (B, params["n_kv_heads"], S, params["head_dim"])
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(params["n_layers"])]


def grow(cache, S):
    """Makes room for S positions in all. It is kept small, since a product with a slice would copy it."""
    for i, layer in enumerate(cache):
        if S > layer[0].shape[2]:
            cache[i] = tuple(pad(x, (0, 0, 0, S - x.shape[2])) for x in layer)


@torch.no_grad()
def prefill(tokens, weights, params, cache, start=0, lengths=None, watched=forward, most_tokens=None):
    """Reads tokens (B T) at positions start, start + 1, … into the cache: logits (B 1 V) of the last.

    lengths (B): how many of a row's tokens count; later ones overwrite the rest. It goes in chunks of
    most_tokens, counted over all rows, or of what suits the memory; the last one runs through `watched`.
    """
    B, T = tokens.shape
    torch.empty(2**24, dtype=torch.uint8)  # with this much freed once, glibc keeps memory for the next tensor
    grow(cache, start + T)
    last = torch.full((B,), T - 1, device=tokens.device) if lengths is None else lengths - 1
    suitable, most_scores = (256, 2**25) if tokens.is_cpu else (4096, 2**28)  # scores: B H T S numbers
    b, logits = 0, 0
    while b < T:
        chunk = min(most_tokens or suitable, max(32, most_scores // (params["n_heads"] * (start + b + 1))))
        a, b = b, min(b + max(1, chunk // B), T)
        positions = torch.arange(start + a, start + b, device=tokens.device)[None]
        read = watched if b == T else forward
        seen = [(keys[:, :, : start + b], values[:, :, : start + b]) for keys, values in cache]
        found = read(tokens[:, a:b], weights, params, seen, positions, (last - a).clamp(0, b - a - 1))
        logits = torch.where(last[:, None, None] >= a, found, logits)  # a row's last may be in any chunk
    return logits


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Token ids (B) from logits (B V): the likeliest, or with a temperature drawn from softmax(logits / it).

    top_k > 0 leaves only the k likeliest. top_p < 1 then leaves the fewest likeliest that together reach it
    (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = (found[:, : top_k or None] for found in logits.sort(descending=True, stable=True))
    probs = ((logits - logits[:, :1]) / temperature).softmax(-1)  # less the largest, lest a tiny one overflow
    before = probs.cumsum(-1) - probs  # the probability of all that is likelier
    probs = probs.masked_fill(before >= top_p, 0) if top_p < 1 else probs
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate(logits, weights, params, cache, positions, choose=sample, step=forward):
    """Yields token ids (B), one after another for each row, until a row has all the context can hold.

    logits (B 1 V): from prefill. positions (B): the first free one of each row. choose: turns logits (B V)
    into ids (B). step: forward, or it compiled. Indices of rows that are sent back leave only those.
    """
    while (end := int(positions.max()) + 1) <= params["max_seq_len"]:
        tokens = choose(logits[:, -1])
        rows = yield tokens
        if rows is not None:
            tokens, positions = tokens[rows], positions[rows]
            cache = [(keys[rows], values[rows]) for keys, values in cache]
        if end > cache[0][0].shape[2]:
            grow(cache, min(end + (127 if tokens.is_cpu else 511), params["max_seq_len"]))
        logits = step(tokens[:, None], weights, params, cache, positions[:, None], 0 * positions)
        positions = positions + 1


# ------------------------------------------------------------------------ looking inside: the probes

def check_dims(sizes, name, dims, tensor):
    """Binds the letters of dims ("B H T E") to the tensor's sizes; ValueError if a letter means two sizes."""
    letters, found = dims.split(), list(tensor.shape)
    named = [int(a) if a.isdigit() else sizes.setdefault(a, size) for a, size in zip(letters, found)]
    if named != found or len(letters) != len(found):
        raise ValueError(f"{name} should be {dims} with {sizes}, but its shape is {found}")


def show_shapes(which, params, tokenizer):
    """A probe for one pass: names, dims, shapes of "all" layers or the "first"; then what is likely next."""
    sizes = {}

    def probe(name, dims, tensor):
        check_dims(sizes, name, dims, tensor)
        if which == "all" or name.startswith("layers.0.") or not name.startswith("layers."):
            shape, dtype = " ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")
            print(f"{name:<32} {dims:<8} {shape:<16} {dtype}", file=sys.stderr)
        elif name == "layers.1.attention_norm":
            print(f"and the same in the other {params['n_layers'] - 1} layers", file=sys.stderr)
        if name == "logits":
            top = tensor[0, -1].softmax(-1).topk(min(5, tensor.shape[-1]))
            print("next: " + "  ".join(f"{tokenizer.decode([t])!r} {p:.1%}" for p, t in zip(*map(list, top))),
                  file=sys.stderr)
        return tensor

    return probe


def check_finite(logits, weights):
    """ValueError if logits are NaN or infinite, with the name of the first weight that is."""
    if not logits.isfinite().all():
        broken = next((name for name, w in weights.items() if not w.isfinite().all()), None)
        raise ValueError(f"{broken} holds a number that is not finite; the file is damaged" if broken else
                         "the logits are not finite, though the weights are; --dtype float32 may help")


def record(trace):
    """A probe that puts a copy of every tensor into the dict `trace`, by name."""
    def probe(name, dims, tensor):
        trace[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return tensor

    return probe


# ------------------------------------------------------------------------ the command line

def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
        epilog="examples:\n" + __doc__[__doc__.index("    python") : __doc__.index("\n\nDimension")])
    add = parser.add_argument
    add("prompt", nargs="?", help="text to go on from; without one it is asked for, or read from stdin")
    add("--weights", metavar="DIR", default=str(Path(__file__).resolve().parent / "weights" / "tiny"),
        help="a checkpoint: Meta's, Hugging Face's or rasbt's, a folder or gs://… (default: weights/tiny)")
    add("--cache-dir", metavar="DIR", help="where copies of remote folders are kept (default: in ~/.cache)")
    add("--rope-scaling-factor", metavar="X", type=float, help="overrides what was found or guessed")
    add("--force", action="store_true", help="load the model even if memory looks too small for it")
    add("--chat", action="store_true", help="put the prompt as a question, in Llama 3's chat format")
    add("--prompts", metavar="FILE", help="many prompts at once, one a line (-: stdin), in JSON; no shapes")
    add("--system", metavar="TEXT", help="with --chat: what the assistant is told first")
    add("--max-new-tokens", metavar="N", default=100, type=int, help="default 100; 0: only the prompt's pass")
    add("--temperature", metavar="X", default=0.0, type=float, help="0, the default: the likeliest token")
    add("--top-k", metavar="N", default=0, type=int, help="draw from the N likeliest tokens only")
    add("--top-p", metavar="P", default=1.0, type=float, help="draw from the likeliest that together reach P")
    add("--seed", metavar="N", type=int, help="same seed, same text (default: another one each time)")
    add("--show", choices=("all", "first", "none"), default="first", help="shapes of which layers (first)")
    add("--save-trace", metavar="FILE", help="write every tensor of the prompt's pass, as .safetensors")
    add("--break-at", metavar="NAME", action="append", default=[],
        help='stop in the debugger once this tensor exists; "layers.3.*scores" works, and several times')
    add("--compile", action="store_true", help="compile the step from token to token: see the README")
    add("--layers", metavar="N", type=int, help="run the first N layers only")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="compute in this (default: the weights')")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")

    def wrong(message):
        raise ValueError(f"{message} (--help shows what there is)")

    parser.error = wrong
    args = parser.parse_args(argv)
    for flag, low, high in (("max_new_tokens", 0, 10**9), ("temperature", 0, 1000), ("top_k", 0, 10**9),
                            ("top_p", 1e-6, 1), ("seed", 0, 2**63 - 1), ("layers", 1, math.inf),
                            ("rope_scaling_factor", 1, 1000)):
        if getattr(args, flag) is not None and not low <= getattr(args, flag) <= high:
            wrong(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be from {low} to {high}")
    if args.system is not None and not args.chat:
        wrong("--system needs --chat")
    if args.prompts is not None and (args.prompt is not None or args.break_at or args.save_trace):
        wrong("--prompts goes without a prompt, --break-at and --save-trace")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(device for device in there if there[device])
    if not there[args.device]:
        wrong(f"--device {args.device}: PyTorch {torch.__version__} finds none here; cpu always works")
    return args


def beside(name):
    """A module of this repository by its path, such as weights/layouts.py; ValueError if it is not there."""
    path = Path(__file__).resolve().parent / name
    if not path.is_file():
        raise ValueError(f"for this, {name} is needed beside the script")
    sys.path[:0] = {str(path.parent)}.difference(sys.path)
    return importlib.import_module(path.stem)


def load_model(path, device="cpu", dtype=None, n_layers=None, rope_scaling_factor=None, **checks):
    """Weights, params and tokenizer of a folder, and one line on stderr that says what was found.

    dtype None keeps the file's; n_layers keeps the first so many. `checks`, and how layouts other than Meta's
    are read: open_checkpoint in weights/layouts.py.
    """
    started = time.perf_counter()
    if (Path(__file__).resolve().parent / "weights" / "layouts.py").is_file():
        params, shards, tokenizer, convert, words = beside("weights/layouts.py").open_checkpoint(
            path, device, dtype, n_layers, rope_scaling_factor, **checks)
    else:
        folder, convert = Path(path).expanduser(), None
        shards = {file.name: open_pth(file) for file in meta_files(folder)}
        params, tokenizer = read_params(folder), load_tokenizer(folder / "tokenizer.model")
        params |= {"rope_scaling_factor": rope_scaling_factor or params["rope_scaling_factor"]}
        words = f"Meta layout, {len(shards)} shards, RoPE scaling {params['rope_scaling_factor']:g}"
    of = params["n_layers"]
    if not 0 < (n_layers or of) <= of:
        raise ValueError(f"{path} has {of} layers, {n_layers} are asked for")
    if tokenizer.n_vocab != params["vocab_size"] * processes()[1]:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, but vocab_size is "
                         f"{params['vocab_size']}; they are of different models")
    weights = load_weights(shards, params, device, dtype, convert, n_layers)
    tied, kind = weights["output.weight"] is weights["tok_embeddings.weight"], weights["norm.weight"].dtype
    count = sum(w.numel() for w in weights.values()) - tied * weights["output.weight"].numel()
    print(f"{path}: {words}, {n_layers or of} of {of} layers, {count / 1e6:,.1f} M parameters, {kind}, head "
          f"{'' if tied else 'not '}tied, {count * kind.itemsize / 1e9:.3g} GB on {device}, "
          f"{time.perf_counter() - started:.1f} s".replace("torch.", ""), file=sys.stderr)
    return weights, params | {"n_layers": n_layers or of}, tokenizer


def prompt_ids(prompt, tokenizer, args, context, said=()):
    """Token ids of a prompt, behind those `said` before. ValueError if it is empty, no UTF-8, or too long."""
    if not prompt:
        raise ValueError("the prompt is empty")
    if re.search("[\ud800-\udfff]", prompt + (args.system or "")):  # so Python keeps bytes that are no UTF-8
        raise ValueError("the prompt is not valid UTF-8")
    ids = list(said) or [special(tokenizer, "begin_of_text")]  # one, at the very start
    if args.chat:
        if args.system is not None and not said:
            ids += chat_message(tokenizer, "system", args.system)
        ids += chat_message(tokenizer, "user", prompt) + chat_message(tokenizer, "assistant")
    else:
        ids += encode(tokenizer, prompt)
    if len(ids) > context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the context only {context}")
    return ids


def stop_ids(tokenizer):
    return [special(tokenizer, name) for name in ("end_of_text", "eot_id", "eom_id")]


def peak_memory(device):
    """In bytes: what tensors took on a GPU, or else this whole process, pages of mapped weights included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = {"linux": 1024, "darwin": 1}.get(sys.platform)  # Windows' Python has no such module
    return importlib.import_module("resource").getrusage(0).ru_maxrss * unit if unit else math.nan


def answer(ids, cache, model, args, go_on, watched, show, cached=0):
    """Goes on from ids, of which the cache holds the first `cached`: text to stdout, all else to stderr.

    go_on: generate with all its options. watched: forward, or a copy that is looked into. Returns the new
    ids. All but the last of them are then in the cache.
    """
    weights, params, tokenizer = model
    if show != "none":
        pieces = [f"{token} {tokenizer.decode([token])!r}" for token in ids[cached:][:64]]
        print(f"prompt of {len(ids)} tokens:", *pieces, "…" * (len(ids) > 64), sep="  ", file=sys.stderr)
        watched = functools.partial(watched, probe=show_shapes(show, params, tokenizer))
    tokens = torch.tensor([ids[cached:]], device=args.device)
    started = time.perf_counter()
    logits = prefill(tokens, weights, params, cache, cached, watched=watched)
    check_finite(logits, weights)
    read = first = time.perf_counter()

    if not args.chat and sys.stdout.isatty() and sys.stderr.isatty():
        print(tokenizer.decode(ids[1:]), end="", file=sys.stderr, flush=True)  # so that the text reads as one
    stops, at = stop_ids(tokenizer), torch.tensor([len(ids)], device=args.device)
    new, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")  # keeps a character back until whole
    for token in itertools.islice(go_on(logits, weights, params, cache, at), args.max_new_tokens):
        new.append(int(token))
        if len(new) == 1:
            first = time.perf_counter()
        if new[-1] in stops:
            break
        print(decoder.decode(tokenizer.decode_single_token_bytes(new[-1])), end="", flush=True)
    print(decoder.decode(b"", final=True), end="\n" * bool(new), flush=True)

    took, T = time.perf_counter() - first, len(ids) - cached
    if len(ids) + len(new) == params["max_seq_len"]:
        print(f"[the context of {params['max_seq_len']:,} tokens is full]", file=sys.stderr)
    elif new and new[-1] not in stops:
        print(f"[cut at --max-new-tokens {args.max_new_tokens}]", file=sys.stderr)
    print(f"prefill {T} tokens, {T / (read - started):.1f} tok/s; first token after {first - started:.3f} s; "
          f"decode {len(new)} tokens, {max(0, len(new) - 1) / took:.1f} tok/s; "
          f"peak memory {peak_memory(args.device) / 1e9:.2f} GB", file=sys.stderr)
    return new


def run(args):
    terminal = args.prompt is None and not args.prompts and sys.stdin.isatty()
    if args.prompt is not None or terminal:
        lines = [args.prompt or ""]
    else:
        file = open(args.prompts, "rb") if args.prompts not in (None, "-") else sys.stdin.buffer
        text = file.read().decode("utf-8-sig", "surrogateescape").rstrip("\r\n")
        lines = [line.rstrip("\r") for line in text.split("\n")] if args.prompts else [text]

    model = weights, params, tokenizer = load_model(
        args.weights, args.device, args.dtype and getattr(torch, args.dtype), args.layers,
        args.rope_scaling_factor, cache_dir=args.cache_dir, force=args.force,
        positions=lambda tokenizer, context: min(len(lines), 32) * min(  # of the cache, to check the memory
            context, args.max_new_tokens + len(prompt_ids(max(lines, key=len) or "?", tokenizer, args, 1e9))))
    inside = beside("tools/inside.py") if args.break_at else None
    watched = inside.forward_with_breakpoints(forward, args.break_at, params) if inside else forward
    generator = torch.Generator(args.device).manual_seed(torch.seed() if args.seed is None else args.seed)

    def choose(logits):
        check_finite(logits, weights)
        tokens = sample(logits, args.temperature, args.top_k, args.top_p, generator)
        return summed(tokens * (processes()[0] == 0))  # whatever the others drew, process 0 decides

    step = beside("tools/compiled.py").compiled_step() if args.compile else forward
    go_on = functools.partial(generate, choose=choose, step=step)
    if args.prompts:
        return beside("tools/batch.py").answer_all(lines, model, args, go_on)
    if terminal:
        return beside("tools/conversation.py").converse(model, args, go_on, watched)
    ids = prompt_ids(lines[0], tokenizer, args, params["max_seq_len"])
    if args.save_trace is not None:
        about, tokens = {"prompt": lines[0], "weights": args.weights}, torch.tensor([ids], device=args.device)
        beside("tools/inside.py").save_trace(args.save_trace, tokens, model, about)
    answer(ids, make_cache(weights, params, 1), model, args, go_on, watched, args.show)


def main(argv=None):
    """Runs the command line and returns the exit code: 2 and a line on stderr for what the user did wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")  # of a terminal that cannot show every letter
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # started by torchrun
            return beside("tools/parallel.py").run_together(parse_arguments, argv, run)
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the text has gone: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except bdb.BdbQuit:  # the debugger's "quit"
        pass
    except (ValueError, OSError, MemoryError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "memory" not in str(problem):
            raise  # a mistake of ours
        print(f"error: {str(problem).partition(chr(10))[0] or 'out of memory'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
