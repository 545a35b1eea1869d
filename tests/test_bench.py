"""tools/bench.py: contenders in processes of their own, and one line for those who cannot take part."""

import contextlib
import importlib.metadata
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import llama3_from_scratch as llama
from parts import compiled
from tools import bench, bench_gpu

TINY = ROOT / "weights/tiny"


def test_a_contender_in_its_own_process():
    weights, params, _ = llama.load_model(TINY)
    process = bench.start("eager", TINY, "cpu")
    try:
        for length, new in ((9, 3), (4, 0)):
            cache, ids = llama.make_cache(weights, params, 1), bench.prompt(length)
            logits = llama.prefill(torch.tensor([ids]), weights, params, cache)
            steps = llama.generate(logits, weights, params, cache, torch.tensor([length]))
            found = bench.ask(process, length, new)
            assert found["tokens"] == [int(next(steps)) for _ in range(new + 1)]
            assert len(found["times"]) == new + 1 and min(found["times"]) > 0
    finally:
        process.terminate()
        process.wait(60)


def test_who_cannot_take_part_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text("1 / 0")
    monkeypatch.setenv("GPT_FAST", str(tmp_path))
    process = bench.start("gpt-fast", TINY, "cpu")
    with pytest.raises(
        ValueError, match="^gpt-fast failed: ZeroDivisionError: division by zero; to see more: "
    ):
        bench.ask(process, 9, 3)
    process.wait(60)
    with pytest.raises(ValueError, match="^gpt-fast failed: its process ended; to see more: "):
        bench.ask(process, 9, 3)
    monkeypatch.delenv("GPT_FAST")
    with pytest.raises(ValueError, match="^gpt-fast: set GPT_FAST to the path of its checkout$"):
        bench.run([str(TINY), "--peers", "gpt-fast"])
    monkeypatch.setenv("GPT_FAST", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="^gpt-fast: set GPT_FAST to the path of its checkout$"):
        bench.run([str(TINY), "--peers", "gpt-fast"])

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        ValueError, match="^llama.cpp is not installed: pip install llama-cpp-python$"
    ):
        bench.run([str(TINY), "--peers", "llama.cpp"])


def alive(group):
    """Processes of a group that have not ended."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(number) == group and state != "Z" else []
    return len(states)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system has no /proc")
def test_told_to_end_a_benchmark_leaves_no_process(monkeypatch, capsys):
    """SIGTERM while contenders load: they end with all that they have started, at once."""
    started = []

    def start(name, folder, device):
        code = "import subprocess, sys; subprocess.Popen(['sleep', '99']); print(1, flush=True)"
        code += "; sys.stdin.read()"
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        started.append(process.pid)
        return process

    def ask(process, length, new):
        process.stdout.readline()
        assert alive(process.pid) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    for real in (bench.start, bench_gpu.start):  # else there would be no group to end
        assert "start_new_session=True" in inspect.getsource(real)
    monkeypatch.setattr(bench, "start", start)
    monkeypatch.setattr(bench, "ask", ask)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    began = time.time()
    assert bench.main([str(TINY), "--quick"]) == 143
    assert time.time() - began < 20 and len(started) == 1
    deadline = time.time() + 10
    while alive(started[0]) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(started[0]) and "rror" not in capsys.readouterr().err


def test_a_command_that_fails_is_one_line():
    with pytest.raises(ValueError, match="^-c failed: told you$"):
        bench.output_of([sys.executable, "-c", "import sys; sys.exit('told you')"])


def test_the_table_in_words_and_ratios():
    row = {
        "prefill 128": [100, 120],
        "prefill 512": [90, 80],
        "tokens": [1, 2, 3],
        "peak": 1_004_000_000,
    }
    found = {
        name: row | {"decode": [4.0 * n, 8.0 * n]}
        for n, name in enumerate(("eager", "compiled"), 1)
    }
    found["peer"] = row | {"decode": [16.0, 8.0], "tokens": [1, 2, 4], "peak": None}
    lines = list(bench.report_side_by_side(found, [10, 20], 400, 10**9, 10**6, 10**9))
    assert lines[0].startswith("Read bandwidth 15 (10 to 20) GB/s: at most 15 (10 to 20) tokens")
    cells = lines[-1].split(" | ")
    assert lines[-2].endswith(" | 3 MB |")
    assert cells[3:] == ["12 (8 to 16)", "0.62", "1.25", "100%", "2 of 3", " |"]


def test_a_gpus_figures_as_tables():
    decode = {"sync_ms": 2.0, "free_ms": 1.0, "took_s": 1.0}
    found = {
        ("step", "1b"): [
            (("decode", 512), decode | {"free_ms": 99.0}),  # the first compiles, and does not count
            (("decode", 512), decode),
            (("machine", None), {"name": "X", "torch": "2", "read_GBs": 4000.0, "TFLOPs": 700.0}),
            (("profile", 512), {"kernels": [[5.0, 1.0, "triton_a"]]}),
        ],
        ("rows", "1b"): [(("rows", 8), {"ms": 9.0}), (("rows", 8), {"ms": 2.0})],
        ("far", "1b"): [(("decode", 131072), {"error": "no answer in time"})],
    }
    text = "\n".join(bench_gpu.report(found, ["1b"]))
    assert "| step | 2.000 | 1.000 |" in text and "8 rows: 2.00 ms a step, 4.0 × one row" in text
    assert "X, torch 2; reads 4,000 GB/s" in text and "triton_a" in text
    assert "| step at 131,072 positions | not measured | not measured |" in text


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match="GPT_FAST"):
        bench_gpu.run(["--device", "cpu", "--peers", "gpt-fast"])


def test_the_command_lines_own_words_are_understood(capsys):
    compiled.first_call("the step", lambda: torch.zeros(1))
    assert llama.main(["Once upon a time", "--max-new-tokens", "9", "--show", "none"]) == 0
    said = capsys.readouterr().err
    assert bench_gpu.printed(said)["compiled_s"] == [0]
    assert bench_gpu.printed(re.sub(r", [\d.]+/s; peak", ", 1,071/s; peak", said))["tok_s"] == 1071
