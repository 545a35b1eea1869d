"""Reading checkpoints in Meta's layout: shards, ties, shapes, memory."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, SMALL, full_params, quick_python, read_params

import llama3_from_scratch as llama
from tools.random_checkpoint import random_checkpoint, random_weights

RELEASES = {  # facts: dim, layers, heads, multiplier, multiple_of -> F, RoPE factor
    "3-8B": (4096, 32, 32, 1.3, 1024, None, 14336, 8),
    "3.1-8B": (4096, 32, 32, 1.3, 1024, True, 14336, 8),
    "3-70B": (8192, 80, 64, 1.3, 4096, False, 28672, 8),
    "3.1-405B": (16384, 126, 128, 1.2, 4096, True, 53248, 8),
    "3.2-1B": (2048, 16, 32, 1.5, 256, True, 8192, 32),
    "3.2-3B": (3072, 28, 24, 1.0, 256, True, 8192, 32),
}


@pytest.mark.parametrize("release", RELEASES)
def test_params_of_the_releases(tmp_path, release):
    dim, layers, heads, multiplier, multiple, scaled, F, factor = RELEASES[release]
    given = {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "norm_eps": 1e-05,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple,
        "rope_theta": 500000.0,
    }
    (tmp_path / "params.json").write_text(
        json.dumps(given | ({} if scaled is None else {"use_scaled_rope": scaled}))
    )
    params = read_params(tmp_path)
    assert (params["ffn_dim"], params["rope_scaling_factor"]) == (F, factor)
    assert (
        params["max_seq_len"] == (131072 if scaled else 8192) and params["head_dim"] == dim // heads
    )
    (tmp_path / "params.json").write_text(json.dumps(given | {"rope_scaling_factor": 5}))
    assert read_params(tmp_path)["rope_scaling_factor"] == 5  # the file's own word wins


def load(folder, **options):
    return llama.load_model(folder, **options)[0]


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_joined(checkpoint, shards, dtype):
    folder = checkpoint(shards=shards, dtype=dtype, n_kv_heads=8)
    weights, expected = load(folder), random_weights(read_params(folder), dtype=dtype)
    assert weights.keys() == expected.keys()
    assert all(
        torch.equal(weights[name], expected[name]) and weights[name].dtype == dtype
        for name in weights
    )


def test_one_shard_is_used_from_the_mapped_file(checkpoint):
    folder = checkpoint()
    weights = load(folder)
    file = str(folder / "consolidated.00.pth")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(file)]
    ranges = [(int(a, 16), int(b, 16)) for a, b in ranges]
    assert ranges
    assert all(any(a <= w.data_ptr() < b for a, b in ranges) for w in weights.values())
    converted = load(folder, dtype=torch.float32)
    assert not any(a <= w.data_ptr() < b for a, b in ranges for w in converted.values())


def test_tied_and_missing_heads(checkpoint):
    folder = checkpoint(tied=True)
    shared = load(folder)
    shard = torch.load(folder / "consolidated.00.pth")
    del shard["output.weight"]
    shard["rope.freqs"] = torch.zeros(4)  # as in Llama 2's files: ignored
    torch.save(shard, folder / "consolidated.00.pth")
    for weights in (shared, load(folder), load(folder, dtype=torch.float32)):
        assert (
            weights["output.weight"] is weights["tok_embeddings.weight"]
            and "rope.freqs" not in weights
        )
    assert (
        load(checkpoint("untied"))["output.weight"]
        is not load(checkpoint("untied"))["tok_embeddings.weight"]
    )


def test_first_layers_only(checkpoint):
    folder = checkpoint()
    weights, params, _ = llama.load_model(folder, n_layers=1)
    assert params["n_layers"] == 1
    assert weights.keys() == llama.weight_shapes(read_params(folder) | {"n_layers": 1}).keys()


def test_converting_peaks_at_the_model_plus_one_tensor(tmp_path):
    """Anonymous memory, watched from outside while 4 shards are joined and converted to float32."""
    params = SMALL | {"dim": 1024, "n_layers": 8, "vocab_size": 8192, "n_heads": 8, "n_kv_heads": 8}
    folder = random_checkpoint(tmp_path / "big", params, shards=4)
    code = (
        f"import torch; folder = {str(folder)!r};"
        "import llama3_from_scratch as l, os; from parts import layouts; print(os.getpid(), flush=True);"
        "input();"
        "w, *_ = l.load_model(folder, dtype=torch.float32, quiet=True);"
        "print(sum(t.nbytes for t in w.values()), max(t.nbytes for t in w.values()), flush=True)"
    )
    process = subprocess.Popen(
        [quick_python(), "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    number = int(process.stdout.readline())  # once it is ready

    def anonymous():
        with open(f"/proc/{number}/status") as status:
            return next(
                int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")
            )

    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            try:
                peak = max(peak, anonymous())
            except (OSError, StopIteration):
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate("\n")
    done.set()
    watcher.join()
    whole, largest = map(int, output.split())
    assert whole > 300e6 and largest < whole / 16
    # with some slack for what malloc keeps; holding the bfloat16 tensors as well would make it 1.5
    assert 0.9 < (peak - before) / whole < 1.3


def test_importing_has_no_side_effect(tmp_path):
    code = (
        "import torch; threads = torch.get_num_threads();"
        "import llama3_from_scratch as l; assert torch.get_num_threads() == threads;"
        "assert torch.is_grad_enabled();"
        "state = [n for n, v in vars(l).items() if isinstance(v, (list, dict, set)) and n[:2] != '__'];"
        "tables = [n for n in state if n.isupper()]; assert state == tables, state;"
        "before = {n: repr(vars(l)[n]) for n in tables}; l.complete('Hi', max_new_tokens=2);"
        "assert before == {n: repr(vars(l)[n]) for n in tables}"  # constants, not state
    )
    command = [sys.executable, "-c", code]
    env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}  # one thread would hide it
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not list(
        tmp_path.iterdir()
    )


def test_full_params_are_stable(tmp_path):
    assert full_params(tmp_path / "a") == full_params(tmp_path / "b")
