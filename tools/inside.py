"""Looking inside `forward`, for the script's --break-at and --save-trace."""

import fnmatch
import inspect
import json
import re
import sys
from pathlib import Path

import safetensors
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama3_from_scratch import check_finite, forward, record


def is_trace(path):
    """Is this a file that save_trace wrote?"""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {"prompt", "params"} <= (file.metadata() or {}).keys()
    except (OSError, safetensors.SafetensorError):
        return False


@torch.inference_mode()
def save_trace(path, tokens, weights, params, about):
    """Writes every tensor of one pass over tokens (B T), without a cache, to a .safetensors file.

    about: strings for its metadata, beside params and dtype.
    """
    trace, dtype, target = {}, str(weights["norm.weight"].dtype).removeprefix("torch."), Path(path).resolve()
    about = about | {"params": json.dumps(params), "dtype": dtype}
    beside = target.with_name(f"{target.name}.part")
    if target.exists() and not (target.is_file() and is_trace(target)):
        raise ValueError(f"{path}: the trace would take the place of something else")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors would leave a file that only its owner can read
        check_finite(forward(tokens, weights, params, probe=record(trace)), weights)
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
    except (OSError, safetensors.SafetensorError) as problem:
        raise ValueError(f"{path}: the trace cannot be written ({problem})") from None
    finally:
        beside.unlink(missing_ok=True)


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
