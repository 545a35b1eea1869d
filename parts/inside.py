"""Looking inside `forward`: what the script's --break-at and --save-trace do, and probes that compose."""

import fnmatch
import inspect
import json
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


def logit_lens(
    trace: dict[str, Tensor], weights: llama.Weights, params: llama.Params, top: int = 10
) -> tuple[Tensor, Tensor]:
    """What would each layer's output predict, were it the last? Token ids and probabilities (L B T top).

    It goes through the final norm and the head, as the last layer's does. Source: nostalgebraist,
    "interpreting GPT: the logit lens", 2020.
    """
    ids, probs = [], []
    for i in range(params["n_layers"]):
        x = trace[f"layers.{i}.out"].to(weights["norm.weight"].device)
        h = llama.rms_norm(x, weights["norm.weight"], params["norm_eps"])
        logits = llama.project(h, weights["output.weight"]).float()
        if processes()[1] > 1:
            from parts import parallel

            logits = parallel.side_by_side(logits)
        likeliest = logits.softmax(-1).topk(min(top, logits.shape[-1]))
        ids.append(likeliest.indices.cpu())
        probs.append(likeliest.values.cpu())
    return torch.stack(ids), torch.stack(probs)


def head_rows(trace: dict[str, Tensor], weights: llama.Weights) -> dict[str, Tensor]:
    """Which rows of the head gave the likeliest tokens their logits? Ids (N), and the rows of these (N D)."""
    ids = trace["lens.ids"][-1].unique()
    head = weights["output.weight"]
    if processes()[1] > 1:
        from parts import parallel

        ids = parallel.of_process_0(ids)
        rows = parallel.rows_of_all(head, ids)
    else:
        rows = head[ids.to(head.device)]
    return {"lens.head_ids": ids, "lens.head_rows": rows.cpu()}


@torch.inference_mode()
def traced(tokens: Tensor, model: llama.Model) -> dict[str, Tensor]:
    """Every tensor of one pass over tokens (B T), by name, and what belongs to the logit lens.

    Whole, whoever computed it.
    """
    weights, params, _ = model
    trace: dict[str, Tensor] = {}
    probe = record(trace)
    rank, N = processes()
    if rank > 0:  # these write no file, and need for the lens no more than

        def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
            if re.fullmatch(r"layers\.\d+\.out", name):
                trace[name] = tensor.clone()
            return tensor

    if N > 1:
        from parts import parallel

        probe = parallel.gathering(probe, params)
    check_finite(llama.forward(tokens, weights, params, probe=probe), weights)
    trace["lens.ids"], trace["lens.probs"] = logit_lens(trace, weights, params)
    return trace | head_rows(trace, weights)


def save_trace(path: str, tokens: Tensor, model: llama.Model, about: dict[str, str]) -> None:
    """Writes every tensor of one pass over tokens (B T), without a cache, to a .safetensors file.

    Beside them "lens.ids" and "lens.probs" (logit_lens), and of the head the rows of the likeliest tokens,
    "lens.head_ids" and "lens.head_rows" (head_rows). about: strings for the metadata; params, dtype and
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
    shown = torch.cat([trace["tokens"].flatten(), trace["lens.ids"].flatten()])
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
