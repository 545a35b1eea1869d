"""Looking inside `forward`: what the script's --break-at and --save-trace do, and probes that compose."""

import fnmatch
import inspect
import json
import re
import sys
from pathlib import Path

import safetensors
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama3_from_scratch import check_finite, forward, joined, processes, project, record, rms_norm


def is_trace(path):
    """Is this a file that save_trace wrote?"""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {"prompt", "params"} <= (file.metadata() or {}).keys()
    except (OSError, safetensors.SafetensorError):
        return False


def logit_lens(trace, weights, params, top=10):
    """What would each layer's output predict, were it the last? Token ids and probabilities (L B T top).

    It goes through the final norm and the head, as the last layer's does. Source: nostalgebraist,
    "interpreting GPT: the logit lens", 2020.
    """
    ids, probs = [], []
    for i in range(params["n_layers"]):
        x = trace[f"layers.{i}.out"].to(weights["norm.weight"].device)
        h = rms_norm(x, weights["norm.weight"], params["norm_eps"])
        logits = joined(project(h, weights["output.weight"]).float())
        found = logits.softmax(-1).topk(min(top, logits.shape[-1]))
        ids.append(found.indices.cpu())
        probs.append(found.values.cpu())
    return torch.stack(ids), torch.stack(probs)


@torch.inference_mode()
def traced(tokens, model):
    """Every tensor of one pass over tokens (B T), by name, and the logit lens; whole, whoever computed it."""
    (weights, params, _), trace = model, {}
    probe = record(trace)
    if processes()[0] > 0:  # these write no file, and need for the lens no more than

        def probe(name, dims, tensor):
            return record(trace)(name, dims, tensor) if re.fullmatch(r"layers\.\d+\.out", name) else tensor

    if processes()[1] > 1:
        import parallel

        probe = parallel.gathering(probe, params)
    check_finite(forward(tokens, weights, params, probe=probe), weights)
    trace["lens.ids"], trace["lens.probs"] = logit_lens(trace, weights, params)
    return trace


def save_trace(path, tokens, model, about):
    """Writes every tensor of one pass over tokens (B T), without a cache, to a .safetensors file.

    Beside them "lens.ids" and "lens.probs" (logit_lens). about: strings for the metadata; params, dtype and
    the texts of all tokens that tools/viewer.html names are added.
    """
    if processes()[0] > 0:  # process 0 writes
        traced(tokens, model)
        return
    (weights, params, tokenizer), target = model, Path(path).resolve()
    params = params.get("whole", params) | {"n_layers": params["n_layers"]}
    about = about | {"params": json.dumps(params), "dtype": str(weights["norm.weight"].dtype)[6:]}
    beside = target.with_name(f"{target.name}.part")
    if target.exists() and not (target.is_file() and is_trace(target)):
        raise ValueError(f"{path}: the trace would take the place of something else")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors would leave a file that only its owner can read
        trace = traced(tokens, model)
        named = torch.cat([trace["tokens"].flatten(), trace["lens.ids"].flatten()])
        texts = {n: tokenizer.decode_single_token_bytes(n) for n in named.unique().tolist()}
        about["texts"] = json.dumps(
            {n: text.decode("utf-8", "backslashreplace") for n, text in texts.items()}
        )
        held = {  # what safetensors.torch.save_file does, but that one needs numpy
            name: safetensors.TensorSpec(
                dtype=str(t.dtype).removeprefix("torch."),
                shape=t.shape,
                data_ptr=t.data_ptr(),
                data_len=t.nbytes,
            )
            for name, t in trace.items()
        }
        safetensors.serialize_file(held, beside, metadata=about)
        beside.chmod(mode)
        beside.replace(target)
        viewer = Path(__file__).with_name("viewer.html").as_uri()
        print(
            f"{path}: {len(trace)} tensors, {target.stat().st_size / 1e6:.1f} MB; to look at them open "
            f"{viewer} in a browser and drop the file there",
            file=sys.stderr,
        )
    except (OSError, safetensors.SafetensorError) as problem:
        raise ValueError(f"{path}: the trace cannot be written ({problem})") from None
    finally:
        beside.unlink(missing_ok=True)


def compose(*probes):
    """One probe of several, in their order: each sees what the one before it returned."""

    def probe(name, dims, tensor):
        for one in probes:
            tensor = one(name, dims, tensor)
        return tensor

    return probe


def break_at(*patterns):
    """A probe that calls breakpoint() at tensors whose name matches a glob pattern; "up" leads to forward."""

    def probe(name, dims, tensor):
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            breakpoint()
        return tensor

    return probe


def forward_with_breakpoints(forward, patterns, params):
    """A copy of forward that calls breakpoint() as soon as a tensor exists whose name matches a glob pattern.

    The call is put into the source, behind the probe and on its line, so that any debugger (PYTHONBREAKPOINT)
    stops in forward's own frame, with all its locals. Raises ValueError for a pattern that no name matches.
    """
    source = inspect.getsource(forward)
    probed = re.compile(r'^(?P<line> +\w+ = probe\((?P<string>f?"(?P<name>.+?)").*)$', re.MULTILINE)
    names = [
        found["name"].replace("{i}", str(i))
        for found in probed.finditer(source)
        for i in range(params["n_layers"])
    ]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--break-at {pattern}: no tensor has such a name; --show all prints them")
    source = probed.sub(r"\g<line>; stop_at(\g<string>) and breakpoint()", source)
    lines_before = "\n" * (forward.__code__.co_firstlineno - 1)
    namespace = dict(forward.__globals__)
    namespace["stop_at"] = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    exec(compile(lines_before + source, inspect.getsourcefile(forward), "exec"), namespace)
    return namespace["forward"]
