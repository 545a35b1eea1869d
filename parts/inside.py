"""Looking inside `forward`: what the script's --break-at and --save-trace do, and probes that compose."""

import fnmatch
import inspect
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import safetensors
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import first_line, printable, processes, vocabulary
from parts.files import written_whole


def not_finite(weights: llama.Weights) -> ValueError:
    """The error for logits that are NaN or infinite, with the name of the first weight that is."""
    for name, w in weights.items():
        if not w.isfinite().all():
            cause = "the file is damaged"
            if w.dtype == torch.float16 and not w.isnan().any():
                cause = "it may be too large for float16: --dtype float32 or bfloat16 holds more"
            return ValueError(f"{name} holds a number that is not finite; {cause}")
    return ValueError("the logits are not finite, though the weights are; --dtype float32 may help")


def check_finite(logits: Tensor, weights: llama.Weights) -> None:
    """ValueError if logits are NaN or infinite."""
    if not logits.isfinite().all():
        raise not_finite(weights)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes tensors by name to a .safetensors file, about: strings for its metadata.

    As safetensors.torch.save_file does, but without numpy. Nothing half-written is left behind.
    """
    target = place_of(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    held = {
        name: safetensors.TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    try:
        with written_whole(target) as part:
            safetensors.serialize_file(held, part, metadata=about)
    except (OSError, safetensors.SafetensorError) as problem:
        raise ValueError(f"{path}: cannot be written ({problem})") from None


def place_of(path: str | Path) -> Path:
    """Where a file is to be written, behind all links. ValueError for a path that leads nowhere."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # links in a circle, a NUL
        raise ValueError(f"{path}: cannot be written ({first_line(problem)})") from None


# ------------------------------------------------------------------------------------ probes


def returned(name: str, tensor: object, by: str = "a probe") -> Tensor:
    """The tensor that a probe returned. ValueError, with the name of the step, if it forgot to."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: {by} returned {tensor!r}, not the tensor that is to flow on")
    return tensor


def record(trace: dict[str, Tensor]) -> llama.Probe:
    """A probe that puts a copy of every tensor into the dict `trace`, by name."""

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        trace[name] = (
            returned(name, tensor).detach().cpu().clone(memory_format=torch.contiguous_format)
        )
        return tensor

    return probe


def compose(*probes: llama.Probe) -> llama.Probe:
    """One probe of several, in their order: each sees what the one before it returned.

    ValueError, with the name of the step, if one returns no tensor.
    """

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        for one in probes:
            who = f"the probe {getattr(one, '__name__', repr(one))}"
            tensor = returned(name, one(name, dims, tensor), who)
        return tensor

    return probe


def break_at(*patterns: str) -> llama.Probe:
    """A probe that calls breakpoint() at tensors whose name matches a glob pattern; "up" leads to forward."""

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            breakpoint()
        return returned(name, tensor)

    return probe


def forward_with_breakpoints(
    forward: llama.Forward, patterns: list[str], params: llama.Params
) -> llama.Forward:
    """A copy of forward that calls breakpoint() as soon as a tensor exists whose name matches a glob pattern.

    The call is put into the source, behind the probe and on its line, so that any debugger (PYTHONBREAKPOINT)
    stops in forward's own frame, with all its locals. Raises ValueError for a pattern that no name matches.
    """
    plain = inspect.unwrap(forward)
    source = inspect.getsource(plain)
    probed = re.compile(r'^(?P<line> +\w+ = probe\((?P<string>f?"(?P<name>.+?)").*)$', re.MULTILINE)
    names = [
        found["name"].replace("{i}", str(i))
        for found in probed.finditer(source)
        for i in range(params["n_layers"])
    ]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"--break-at {pattern}: no tensor has such a name; --show all prints them"
            )
    source = probed.sub(r"\g<line>; stop_at(\g<string>) and breakpoint()", source)
    lines_before = "\n" * (plain.__code__.co_firstlineno - 1)
    namespace = dict(plain.__globals__)
    namespace["stop_at"] = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    file = inspect.getsourcefile(plain) or "forward"
    exec(compile(lines_before + source, file, "exec"), namespace)
    if forward is plain:
        return namespace["forward"]
    from parts import parallel

    return parallel.meeting(namespace["forward"])


# ------------------------------------------------------------------------------------ traces


def is_trace(path: Path) -> bool:
    """Is this a file that save_trace wrote?"""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {"prompt", "params"} <= (file.metadata() or {}).keys()
    except (OSError, safetensors.SafetensorError):
        return False


def side_by_side(x: Tensor) -> Tensor:
    """What several processes hold of the last dim, joined; of one process x itself."""
    if processes()[1] == 1:
        return x
    from parts import parallel

    return parallel.side_by_side(x)


def likeliest(logits: Tensor, chosen: Tensor | None, top: int) -> dict[str, Tensor]:
    """Of logits (B T V): the likeliest ids and their probs (B T top), the entropy in bits, and the rank
    of the tokens `chosen` (B T; 0: the likeliest)."""
    if chosen is None:
        chosen = logits.argmax(-1)
    found = []
    for part, asked in zip(logits.split(64, 1), chosen.split(64, 1)):  # copies of a few at a time
        probs = part.softmax(-1)
        best = probs.topk(min(top, probs.shape[-1]))
        entropy = torch.special.entr(probs).sum(-1) / math.log(2)
        rank = (part > part.gather(-1, asked[..., None])).sum(-1)
        found.append((best.indices, best.values, entropy, rank.int()))
    names = ("ids", "probs", "entropy", "rank")
    return {name: torch.cat(parts, 1).cpu() for name, parts in zip(names, zip(*found))}


def read_out(x: Tensor, weights: llama.Weights, params: llama.Params) -> Tensor:
    """The logits (B T V) of a residual stream x (B T D), through the final norm and the head."""
    h = llama.rms_norm(
        x.to(weights["norm.weight"].device), weights["norm.weight"], params["norm_eps"]
    )
    return side_by_side(llama.project(h, weights["output.weight"]).float())


def logit_lens(
    trace: dict[str, Tensor], weights: llama.Weights, params: llama.Params, top: int = 10
) -> tuple[Tensor, Tensor]:
    """What would each layer's output predict, were it the last? Token ids and probabilities (L B T top).

    It goes through the final norm and the head, as the last layer's does. Source: nostalgebraist,
    "interpreting GPT: the logit lens", 2020.
    """
    outs = [trace[f"layers.{i}.out"] for i in range(params["n_layers"])]
    layers = [likeliest(read_out(x, weights, params), None, top) for x in outs]
    return torch.stack([one["ids"] for one in layers]), torch.stack(
        [one["probs"] for one in layers]
    )


def beside_the_pass(
    trace: dict[str, Tensor], weights: llama.Weights, params: llama.Params, top: int = 10
) -> dict[str, Tensor]:
    """What a trace says beside the pass: the logit lens, and what attribution says.

    "lens.ids" and ".probs" as logit_lens gives them, "lens.entropy" (L B T) in bits, and "lens.rank" of the
    token that the whole model finds likeliest; "lens.attention.ids" … the same after a layer's attention.
    """
    lens: dict[str, list[Tensor]] = {}
    chosen = None
    for i in reversed(range(params["n_layers"])):  # the last one says which token is chosen
        for kind, name in (("lens", "out"), ("lens.attention", "after_attention")):
            logits = read_out(trace[f"layers.{i}.{name}"], weights, params)
            if chosen is None:
                chosen = logits.argmax(-1)
            for what, tensor in likeliest(logits, chosen, top).items():
                lens.setdefault(f"{kind}.{what}", []).insert(0, tensor)
    tensors = {name: torch.stack(layers) for name, layers in lens.items()}
    return tensors | attribution(trace, weights, params, tensors["lens.ids"][-1, ..., 0])


def attribution(
    trace: dict[str, Tensor], weights: llama.Weights, params: llama.Params, ids: Tensor
) -> dict[str, Tensor]:
    """What did each layer and each head add to the logits of ids (B T), one for each position?

    The final norm divides the whole stream by one number, so a logit is the sum of what was added to the
    stream: "attribution.embedding" (B T), and "attribution.layers" (L 2 B T) of attention and feed-forward.
    "attribution.heads" (L H B T) is what each head gave of its layer's attention. In float32.
    """
    device, E, L = weights["norm.weight"].device, params["head_dim"], params["n_layers"]
    x = trace[f"layers.{L - 1}.out"].to(device).float()
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"])
    row = rows_of(weights["output.weight"], ids.to(device)).float()
    direction = scale * weights["norm.weight"].float() * row
    seen = []  # the direction, as each layer's heads see it
    for i in range(L):
        seen.append(
            side_by_side(direction @ weights[f"layers.{i}.attention.wo.weight"].float()).cpu()
        )
    if processes()[0] > 0:
        return {}
    direction = direction.cpu()
    layers, heads = [], []
    for i in range(L):
        for name in ("attention.out", "feed_forward.out"):
            layers.append((trace[f"layers.{i}.{name}"].float() * direction).sum(-1))
        by_head = seen[i].unflatten(-1, (-1, E)).transpose(1, 2)  # B H T E
        heads.append(
            (trace[f"layers.{i}.attention.heads"].float() * by_head).sum(-1).transpose(0, 1)
        )
    return {
        "attribution.ids": ids,
        "attribution.embedding": (trace["tok_embeddings"].float() * direction).sum(-1),
        "attribution.layers": torch.stack(layers).unflatten(0, (L, 2)),
        "attribution.heads": torch.stack(heads),
    }


def rows_of(head: Tensor, ids: Tensor) -> Tensor:
    """The rows of the head for token ids (B T), from whoever of several processes holds them."""
    rank, N = processes()
    if N == 1:
        return head[ids]
    own = ids - rank * len(head)
    there = (own >= 0) & (own < len(head))
    rows = head[own.clamp(0, len(head) - 1)] * there[..., None]
    torch.distributed.all_reduce(rows)
    return rows


@torch.inference_mode()
def traced(tokens: Tensor, model: llama.Model) -> dict[str, Tensor]:
    """Every tensor of one pass over tokens (B T), by name, and the logit lens; whole, whoever computed it."""
    weights, params, _ = model
    trace: dict[str, Tensor] = {}
    probe = record(trace)
    rank, N = processes()
    if rank > 0:  # these write no file, and need for the lens no more than

        def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
            if re.fullmatch(r"layers\.\d+\.(out|after_attention)", name):
                trace[name] = tensor.clone()
            return tensor

    if N > 1:
        from parts import parallel

        probe = parallel.gathering(probe, params)
    check_finite(llama.forward(tokens, weights, params, probe=probe), weights)
    return trace | beside_the_pass(trace, weights, params)


def save_trace(path: str, tokens: Tensor, model: llama.Model, about: dict[str, str]) -> None:
    """Writes every tensor of one pass over tokens (B T), without a cache, to a .safetensors file.

    Beside them what beside_the_pass says. about: strings for the metadata; params, dtype and
    the texts of all tokens that tools/viewer.html names are added.
    """
    if processes()[0] > 0:  # process 0 writes
        traced(tokens, model)
        return
    weights, params, tokenizer = model
    target = place_of(path)
    try:
        if target.exists() and not (target.is_file() and is_trace(target)):
            raise ValueError(f"{path}: the trace would take the place of something else")
        # Can it be written there? Better known before the pass than after it.
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as problem:
        raise ValueError(f"{path}: cannot be written ({problem.strerror})") from None
    trace = traced(tokens, model)
    whole = params.get("whole", params) | {"n_layers": params["n_layers"]}
    dtype = str(weights["norm.weight"].dtype).removeprefix("torch.")
    named = ("tokens", "lens.ids", "lens.attention.ids")
    shown = torch.cat([trace[name].flatten() for name in named])
    texts = {}
    for n in shown.unique().tolist():
        texts[n] = vocabulary.piece(tokenizer, n).decode("utf-8", "backslashreplace")
    about = about | {"params": json.dumps(whole), "dtype": dtype, "texts": json.dumps(texts)}
    save_tensors(path, trace, about)
    viewer = Path(__file__).resolve().parents[1] / "tools" / "viewer.html"
    print(
        f"{printable(path)}: {len(trace)} tensors, {target.stat().st_size / 1e6:.1f} MB; to look at them "
        f"open {viewer.as_uri()} in a browser and drop the file there",
        file=sys.stderr,
    )
