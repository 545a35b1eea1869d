"""Looking inside `forward`: names by glob, --break-at, --save-trace, and probes that compose."""

import difflib
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import first_line, lens, printable, processes, quantized, reason, vocabulary
from parts.files import openable, written_whole
from parts.progress import progress
from parts.table import chosen, tokens_at


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
        raise ValueError(f"{path}: cannot be written ({first_line(problem)})") from None


def place_of(path: str | Path) -> Path:
    """Where a file is to be written, behind all links. ValueError for a path that leads nowhere."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # links in a circle, a NUL
        raise ValueError(f"{path}: cannot be written ({first_line(problem)})") from None


# ------------------------------------------------------------------------------------ names

# A step of forward that passes through the probe; line: all of it, variable: what then holds the tensor
STEP = re.compile(
    r'^(?P<line> +(?P<variable>\w+) = probe\((?P<string>f?"(?P<name>.+?)"), (?P<dims>f?".+?").*)$',
    re.MULTILINE,
)


def step_names(forward: llama.Forward, layers: Iterable[object]) -> list[str]:
    """The names of all steps of forward, for these layers; a layer "*" stands for any."""
    source = inspect.getsource(inspect.unwrap(forward))
    steps = [step["name"] for step in STEP.finditer(source)]
    return list(dict.fromkeys(step.replace("{i}", str(i)) for i in layers for step in steps))


def check_names(flag: str, patterns: Iterable[str], n_layers: int) -> None:
    """ValueError, which says what comes near, for a flag's glob that matches no name."""
    beside = lens.BESIDE if flag == "--trace-only" else []
    names = [*step_names(llama.forward, range(n_layers)), *beside]
    for pattern in patterns:
        if not any(chosen(name, [pattern]) for name in names):
            why = nearest(pattern, [*step_names(llama.forward, ["*"]), *beside], n_layers)
            wrong = "no tensor has such a name"
            if flag == "--show":
                wrong = "not all, first or none, and no tensor has such a name"
            raise ValueError(f"{flag} {pattern}: {wrong}; {why}")


def nearest(pattern: str, templates: list[str], n_layers: int) -> str:
    """What a glob that matches nothing may have meant, in words. templates: the names, with layer "*"."""
    given = re.match(r"layers\.(\d+)\.", pattern)
    general = re.sub(r"^layers\.[^.]*\.", "layers.*.", pattern)
    if given and int(given[1]) >= n_layers and any(chosen(t, [general]) for t in templates):
        return f"the layers are 0 to {n_layers - 1}"

    def likeness(template: str) -> float:
        whole = difflib.SequenceMatcher(None, general, template).ratio()
        end, its_end = general.rpartition(".")[2], template.rpartition(".")[2]
        return max(whole, difflib.SequenceMatcher(None, end, its_end).ratio())

    near = [t for t in sorted(templates, key=likeness, reverse=True)[:2] if likeness(t) > 0.6]
    if given and int(given[1]) < n_layers:
        near = [template.replace("*", given[1]) for template in near]
    if not near:
        return "--show all prints them all"
    return f"do you mean {' or '.join(near)}? --show all prints them all"


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
            who = f"the probe {getattr(one, '__name__', type(one).__name__)}"
            tensor = returned(name, one(name, dims, tensor), who)
        return tensor

    return probe


def say_stop(name: str, dims: str, tensor: object, n_layers: int = 0, *more: str) -> None:
    """Says on stderr at which tensor a breakpoint stops, before the debugger asks what to do."""
    if processes()[0] > 0 or os.environ.get("PYTHONBREAKPOINT") == "0":
        return
    where = list(more)
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer and n_layers:
        where.insert(0, f"layer {layer[1]} of 0 to {n_layers - 1}")
    shape, kind = "no tensor", type(tensor).__name__
    if isinstance(tensor, Tensor):
        shape, kind = " ".join(map(str, tensor.shape)), str(tensor.dtype)[6:]
    lines = [f"stopped at {name}", f"{dims}  {shape}  {kind}", ", ".join(where)]
    print(*filter(None, lines), sep="\n           ", file=sys.stderr, flush=True)


def break_at(*patterns: str) -> llama.Probe:
    """A probe that calls breakpoint() at tensors whose name matches a glob pattern; "up" leads to forward."""

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        if chosen(name, patterns):
            say_stop(name, dims, tensor)
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
    check_names("--break-at", patterns, params["n_layers"])
    plain = inspect.unwrap(forward)
    call = r"stop_at(\g<string>, \g<dims>, \g<variable>, '\g<variable>', positions)"
    source = STEP.sub(rf"\g<line>; {call} and breakpoint()", inspect.getsource(plain))
    lines_before = "\n" * (plain.__code__.co_firstlineno - 1)

    def stop_at(name: str, dims: str, x: Tensor, variable: str, positions: Tensor | None) -> bool:
        if not chosen(name, patterns):
            return False
        one_token = dims.split()[1:2] == ["1"]  # norm and logits of the last one
        more = [] if positions is None or one_token else [tokens_at(positions)]
        say_stop(name, dims, x, params["n_layers"], *more, f"in the variable {variable}")
        return True

    namespace = dict(plain.__globals__)
    namespace["stop_at"] = stop_at
    file = inspect.getsourcefile(plain) or "forward"
    exec(compile(lines_before + source, file, "exec"), namespace)
    stopping = namespace["forward"]
    if processes()[1] > 1:
        from parts import parallel

        stopping = parallel.meeting(stopping)
    return quantized.for_quantized(stopping)


# ------------------------------------------------------------------------------------ traces


def is_trace(path: Path) -> bool:
    """Is this a file that save_trace wrote?"""
    try:
        with openable(path) as name, safetensors.safe_open(name, "pt") as file:
            return {"prompt", "params"} <= (file.metadata() or {}).keys()
    except (OSError, safetensors.SafetensorError):
        return False


@torch.inference_mode()
def traced(tokens: Tensor, model: llama.Model, only: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every tensor of one pass over tokens (B T), by name, and what parts/lens.py makes of them.

    Whole, whoever computed it. only: globs of the names that are kept, the tokens always; what is not kept
    takes no memory, unless another that is kept is made from it.
    """
    weights, params, _ = model
    which = list(only) or "all"
    rank, N = processes()
    trace: dict[str, Tensor] = {}
    keep = record(trace)
    for_lens = lens.needed(which, params["n_layers"])

    def asked(name: str) -> bool:
        return name == "tokens" or chosen(name, which)

    def kept(name: str, dims: str, tensor: Tensor) -> Tensor:
        stream = dims == "B T D"  # process 0 writes the file; the others need no more for the lens
        if (rank == 0 and asked(name)) or (name in for_lens and (rank == 0 or stream)):
            keep(name, dims, tensor)
        if re.fullmatch(r"layers\.\d+\.out", name):
            advance(1)
        return tensor

    probe: llama.Probe = kept
    if N > 1:
        from parts import parallel

        probe = parallel.gathering(kept, params)
    last = None
    if not (chosen("norm", which) or chosen("logits", which)):  # large, and not asked for
        last = torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
    with progress("tracing", params["n_layers"], "layer") as advance:
        logits = llama.forward(tokens, weights, params, last=last, probe=probe)
    check_finite(logits, weights)
    with progress("what each layer would say"):
        beside = lens.beside_the_pass(trace, weights, params, which)
    return {name: x for name, x in trace.items() if asked(name)} | beside


def check_place(
    path: str | Path, ours: Callable[[Path], bool] = is_trace, what: str = "trace"
) -> Path:
    """Where a trace can be written, or what else `ours` knows; ValueError if it cannot.

    Better known before the work than after it.
    """
    target = place_of(path)
    try:
        if target.exists() and not (target.is_file() and ours(target)):
            raise ValueError(f"{path}: the {what} would take the place of something else")
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as problem:
        raise ValueError(f"{path}: cannot be written ({reason(problem)})") from None
    return target


def save_trace(
    path: str,
    tokens: Tensor,
    model: llama.Model,
    about: dict[str, str],
    only: Iterable[str] = (),
) -> None:
    """Writes the tensors of one pass over tokens (B T), without a cache, to a .safetensors file.

    Beside them what parts/lens.py makes of them. only: globs of names, as in traced. about: strings for the
    metadata; params, dtype and the texts of all tokens that tools/viewer.html names are added.
    """
    if processes()[0] > 0:  # process 0 writes
        traced(tokens, model, only)
        return
    weights, params, tokenizer = model
    check_place(path)
    trace = traced(tokens, model, only)
    whole = params.get("whole", params) | {"n_layers": params["n_layers"]}
    dtype = str(weights["norm.weight"].dtype).removeprefix("torch.")
    shown = [x.flatten() for name, x in trace.items() if name == "tokens" or name.endswith("ids")]
    if "logits" in trace:
        logits = vocabulary.of_tokens(trace["logits"], tokenizer)
        shown.append(logits.topk(min(10, logits.shape[-1])).indices.flatten())
    texts = {}
    for n in torch.cat(shown).unique().tolist():
        texts[n] = vocabulary.piece(tokenizer, n).decode("utf-8", "backslashreplace")
    about = about | {"params": json.dumps(whole), "dtype": dtype, "texts": json.dumps(texts)}
    save_tensors(path, trace, about)
    viewer = Path(__file__).resolve().parents[1] / "tools" / "viewer.html"
    size = place_of(path).stat().st_size
    size_said = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"
    print(f"{printable(path)}: {len(trace)} tensors, {size_said}", file=sys.stderr)
    print(f"drop it onto {viewer.as_uri()} in a browser", file=sys.stderr)
