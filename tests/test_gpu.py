"""Where a GPU is: every mode of the command line, numbers against the CPU's, the compiled step and prompt."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, relative_error, some_tokens
from references import float64_loop
from torch._dynamo.utils import counters

import llama3_from_scratch as llama
from parts import compiled, eager
from parts.batch import advance, rows_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def on_gpu(model):
    """model(**sizes) of conftest, and its weights on the GPU."""

    def make(**sizes):
        params, weights = model(**sizes)
        return params, weights, {name: w.cuda() for name, w in weights.items()}

    return make


def graphs():
    return counters["stats"]["unique_graphs"]


def test_float32_is_the_cpus(on_gpu):
    params, weights, there = on_gpu()
    tokens = some_tokens(params, B=2, T=90)
    assert not torch.backends.cuda.matmul.allow_tf32
    expected = llama.forward(tokens, weights, params)
    assert relative_error(llama.forward(tokens.cuda(), there, params).cpu(), expected) < 2e-6
    cache = llama.make_cache(there, params, 2)
    logits = llama.prefill(tokens.cuda(), there, params, cache, chunk=7)
    assert relative_error(logits[:, 0].cpu(), expected[:, -1]) < 2e-6


def test_bfloat16_is_as_near_as_metas(on_gpu):
    pytest.importorskip("llama_models")
    pytest.importorskip("fairscale")
    from references import metas_reference

    params, weights, _ = on_gpu()
    rounded = {name: w.bfloat16() for name, w in weights.items()}
    tokens = some_tokens(params, B=1, T=60)
    exact = float64_loop(tokens, {name: w.double() for name, w in rounded.items()}, params)
    ours = llama.forward(
        tokens.cuda(), {name: w.cuda() for name, w in rounded.items()}, params
    ).cpu()
    metas = metas_reference(tokens, rounded, params)
    assert relative_error(ours, exact) <= 1.05 * relative_error(metas, exact)


def go_on(params, weights, tokens, new, step, read=llama.forward, chunk=0, leave=None):
    """Greedy tokens of each row, as in test_compile.py, with a prompt that another function may read."""
    B, T = tokens.shape
    cache = llama.make_cache(weights, params, B)
    logits = llama.prefill(tokens.cuda(), weights, params, cache, read=read, chunk=chunk)
    positions, found = torch.full((B,), T).cuda(), []
    with torch.no_grad():
        for n in range(new):
            tokens = llama.sample(logits[:, -1])
            found.append(tokens.tolist())
            if n == leave:
                tokens, positions, cache = tokens[-1:], positions[-1:], rows_of(cache, [B - 1])
            S = int(positions.max()) + 1
            logits = advance(tokens, weights, params, cache, positions, S, step)
            positions = positions + 1
    return found


def test_compiled_equals_plain_token_for_token(on_gpu):
    """One row and many, prompts short, chunked and behind a cache, growth of the cache, rows that leave."""
    params, _, weights = on_gpu(n_layers=2)
    torch._dynamo.reset()
    before, step, read = graphs(), compiled.compiled_step(), compiled.compiled_prompt()
    for T, new, chunk in ((11, 200, 0), (300, 40, 0), (3, 10, 0), (700, 500, 128)):
        tokens = some_tokens(params, B=1, T=T)
        expected = go_on(params, weights, tokens, new, llama.forward)
        found = go_on(params, weights, tokens, new, step, read, chunk)
        assert found == expected, (T, new)
    assert graphs() - before == 2  # a step and a prompt; each new length, and chunk, is one of them
    tokens = some_tokens(params, B=1, T=4070)
    expected = go_on(params, weights, tokens, 100, llama.forward)
    assert go_on(params, weights, tokens, 100, step, read, 512) == expected
    assert graphs() - before == 3
    for B, T, leave in ((3, 7, 150), (5, 20, None), (2, 140, 3)):
        tokens = some_tokens(params, B=B, T=T)
        expected = go_on(params, weights, tokens, 200, llama.forward, leave=leave)
        assert go_on(params, weights, tokens, 200, step, read, 64, leave) == expected, B
    assert graphs() - before == 5


@pytest.mark.parametrize("T", [40, 4300])
def test_compiled_bfloat16_is_no_worse_than_plain(on_gpu, T):
    """Behind few positions, and behind so many that one token's attention is PyTorch's flash kernel."""
    params, exact, _ = on_gpu()
    weights = {name: w.bfloat16().cuda() for name, w in exact.items()}
    if T > compiled.FAR and not compiled.has_flash_for_one(weights, params):
        pytest.skip("needs a GPU from Ampere on")
    tokens = some_tokens(params, B=1, T=T)
    reference = llama.forward(tokens, {n: w.float().cpu() for n, w in weights.items()}, params)
    errors = []
    for step, read in (
        (llama.forward, llama.forward),
        (compiled.compiled_step(), compiled.compiled_prompt()),
    ):
        cache = llama.make_cache(weights, params, 1)
        with torch.no_grad():
            first = llama.prefill(tokens[:, :-1].cuda(), weights, params, cache, read=read)
            llama.grow(cache, T + 88)
            at, last = torch.tensor([[T - 1]]).cuda(), torch.tensor([0]).cuda()
            second = step(tokens[:, -1:].cuda(), weights, params, cache, at, last)
        errors.append(
            [
                relative_error(first[:, 0].cpu(), reference[:, -2]),
                relative_error(second[:, 0].cpu(), reference[:, -1]),
            ]
        )
    for plain, fast in zip(*errors):
        assert fast < 1.1 * plain < 0.05


FLAGS = ["--max-new-tokens", "20", "--device"]


@pytest.mark.parametrize(
    "more", [[], ["--show", "none"], ["--compile", "--show", "none"], ["--chat"]]
)
def test_command_line(script, more):
    plain = script("Once upon a time", *FLAGS, "cpu", "--dtype", "float32", *more[-1:])
    there = script("Once upon a time", *FLAGS, "cuda", "--dtype", "float32", *more)
    assert there.returncode == 0 and there.stderr.count("error") == 0
    if "--show" not in more:
        assert there.stdout == plain.stdout


def test_prompts_traces_and_sampling(script, tmp_path):
    lines = "Once\nThe cat sat\nOne day\n"
    flags = ["--prompts", "-", "--dtype", "float32", "--max-new-tokens", "12", "--device"]
    plain, there, fast = (
        script(*flags, *device, input=lines)
        for device in (["cpu"], ["cuda"], ["cuda", "--compile"])
    )
    assert plain.stdout == there.stdout == fast.stdout and len(plain.stdout.splitlines()) == 3
    assert all(json.loads(line)["tokens"] for line in fast.stdout.splitlines())
    trace = tmp_path / "t.safetensors"
    assert script("Once", *FLAGS, "cuda", "--save-trace", trace).returncode == 0
    sampled = ["Once", *FLAGS, "cuda", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3"]
    assert script(*sampled).stdout == script(*sampled).stdout != ""


def test_weights_that_are_not_finite(on_gpu, script, tmp_path):
    from tools.random_checkpoint import random_checkpoint

    random_checkpoint("small", tmp_path / "x")
    file = tmp_path / "x" / "consolidated.00.pth"
    held = torch.load(file)
    held["layers.0.attention.wo.weight"][:] = float("nan")
    torch.save(held, file)
    result = script("Hi", "--weights", tmp_path / "x", *FLAGS, "cuda", "--temperature", "1")
    assert result.returncode == 2 and "not finite" in result.stderr


def together(processes):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [ROOT / "llama3_from_scratch.py", "Once upon a time", *FLAGS, "cuda"]
    command += ["--show", "none", "--dtype", "float32"]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_on_one_gpu_are_refused():
    if torch.cuda.device_count() != 1:
        pytest.skip("needs exactly one GPU")
    result = together(2)
    assert result.returncode != 0 and result.stderr.count("error: ") == 1


def test_two_gpus(script):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    result = together(2)
    alone = script("Once upon a time", *FLAGS, "cpu", "--show", "none", "--dtype", "float32")
    assert result.returncode == 0 and result.stdout == alone.stdout


def test_a_prompt_takes_a_quarter_of_the_free_memory(on_gpu, monkeypatch):
    params, _, there = on_gpu(n_layers=2)
    tokens = some_tokens(params, B=1, T=512).cuda()
    cache = llama.make_cache(there, params, 1, 512)
    free = 2**26
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    eager.prefill(tokens[:, :2], there, params, cache)  # the libraries keep some
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    eager.prefill(tokens, there, params, cache)
    assert torch.cuda.max_memory_allocated() - before < 1.2 * free / 4
