import atexit
import functools
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # these models are so small that a second thread only waits
# A second thread that has nothing to do is to sleep, not to spin: other tests run beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

import llama3_from_scratch as llama
from parts import inside
from tools.random_checkpoint import random_checkpoint, random_weights

ROOT = Path(__file__).resolve().parents[1]

SMALL = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}


LONG = ("parallel", "compile", "gguf", "fuzz", "walkthrough")


def pytest_collection_modifyitems(items):
    """Files with tests of half a minute come first: at the end no process is to wait for one of another."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def read_params(folder):
    """All params of a folder in Meta's layout."""
    return llama.fill_params(json.loads((folder / "params.json").read_text()))


def full_params(folder, **changes):
    """All params of SMALL with these changes; they are written to params.json in the folder too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(SMALL | changes))
    return read_params(folder)


@pytest.fixture
def model(tmp_path):
    """model(dtype, seed, **changes to SMALL) -> params, random weights in dtype."""

    def make(dtype=torch.float32, seed=0, tied=False, **changes):
        params = full_params(tmp_path / "params", **changes)
        return params, random_weights(params, seed, tied, dtype)

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(**changes to SMALL, shards=…, …) -> a folder with a random checkpoint in Meta's layout."""

    def make(
        name="checkpoint",
        shards=1,
        seed=0,
        tied=False,
        dtype=torch.bfloat16,
        tokenizer=None,
        **changes,
    ):
        return random_checkpoint(
            tmp_path / name, SMALL | changes, shards, seed, tied, dtype, tokenizer
        )

    return make


@functools.cache
def quick_python():
    """The path of a program like python's that starts at once: forked from a process that has imported torch.

    How: tests/quick.py and tests/fork_server.py. Not for `-OO`, a locale, OMP_NUM_THREADS or `<(…)`.
    """
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    folder = tempfile.mkdtemp(prefix="quick")
    program, place = f"{folder}/python", f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fork_server.py", place],
        stdin=subprocess.PIPE,  # it ends with this process, which holds the other end
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=ROOT,
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)
    assert server.stdout.readline() == b"ready\n"
    start = shlex.join([sys.executable, "-I", "-S", str(ROOT / "tests" / "quick.py"), place])
    Path(program).write_text(f'#!/bin/sh\nexec {start} "$@"\n')
    os.chmod(program, 0o755)
    return program


@pytest.fixture(scope="session")
def real_tokenizer_path():
    """The 128,000-rank tokenizer.model that comes with the package llama-models."""
    import llama_models.llama3

    return Path(llama_models.llama3.__file__).parent / "tokenizer.model"


@pytest.fixture(autouse=True)
def forward_as_it_was(monkeypatch):
    """What a quantized model puts in forward's place is gone after each test."""
    monkeypatch.setattr(llama, "forward", llama.forward)


@pytest.fixture
def script(monkeypatch):
    """script(*arguments, input=…, env=…) -> CompletedProcess of the command line, run in this process."""

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    def run(*arguments, input="", env=(), terminal=False):
        kind = Terminal if terminal else io.TextIOWrapper
        streams = [
            (kind if n == 0 else io.TextIOWrapper)(
                io.BytesIO(), "utf-8", newline="\n", write_through=True
            )
            for n in range(3)
        ]
        streams[0].buffer.write(input if isinstance(input, bytes) else input.encode())
        streams[0].seek(0)
        with monkeypatch.context() as patch:
            for name, stream in zip(("stdin", "stdout", "stderr"), streams):
                patch.setattr(sys, name, stream)
            for name, value in dict(env).items():
                patch.setenv(name, value)
            try:
                code = llama.main([*map(str, arguments)])
            except SystemExit as stop:  # --help
                code = stop.code
        out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


def traced(tokens, weights, params, **options):
    """All traced tensors of one pass, by name, their dims checked on the way."""
    trace, sizes = {}, {}

    def probe(name, dims, tensor):
        llama.check_dims(sizes, name, dims, tensor)
        return inside.record(trace)(name, dims, tensor)

    llama.forward(tokens, weights, params, probe=probe, **options)
    return trace


def relative_error(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖ in float64; what is -inf must be so in both."""
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    masked = theirs == -torch.inf
    assert torch.equal(ours == -torch.inf, masked)
    ours, theirs = ours.masked_fill(masked, 0), theirs.masked_fill(masked, 0)
    return ((ours - theirs).norm() / theirs.norm()).item()


def some_tokens(params, B=2, T=11, seed=5):
    return torch.randint(
        0, params["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed)
    )
