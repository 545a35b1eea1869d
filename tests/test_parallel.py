"""Several processes that share a model, as torchrun starts them, give what one process gives; or end soon."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, quick_python, read_params, relative_error, some_tokens
from safetensors.torch import load_file, save_file

import llama3_from_scratch as llama
from parts import layouts, naming, parallel
from tools.random_checkpoint import random_checkpoint, random_weights, split

SCRIPT = ROOT / "llama3_from_scratch.py"
WORKER = ROOT / "tests" / "parallel_worker.py"


def torchrun(N, *command, nodes=1, node=0, port=0, quick=True, stdin=subprocess.PIPE):
    """A started torchrun with N processes a node, its output piped, in a process group of its own.

    quick: torchrun itself and what it starts are forked from a process that has imported torch. Otherwise
    the numbers of its processes are those of `workers`.
    """
    python = quick_python() if quick else sys.executable
    where = [
        "--nnodes",
        nodes,
        "--node-rank",
        node,
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        port,
    ]
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        N,
        *(where if nodes > 1 else []),
        *command,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [python, *map(str, command)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env | {"PYTHON_EXEC": python},  # for torchrun
        start_new_session=True,
    )


def finished(process, input=None, within=120):
    """(exit code, stdout, stderr, lines that begin with "error:") of a torchrun; it is killed if it hangs."""
    try:
        out, err = process.communicate(input, timeout=within)
    except subprocess.TimeoutExpired:
        for pid, _ in workers(process):
            os.kill(pid, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return (
        process.returncode,
        out,
        err,
        errors_of(err),
    )


def workers(process):
    """(pid, rank) of each process that this torchrun has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                found += [(int(folder.name), int(rank[1]))] if rank else []
        except (OSError, ValueError):
            continue
    return found


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """forks(flags of each process, …) -> [(exit code, stdout, stderr)] of each: as under torchrun.

    They are forked from a process that has imported torch: a dozen starts of Python less for each test.
    program: the file they run, in place of the script; machines: each stands for a machine of its own.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "forked_ranks.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, **pipes)

    def run(*ranks, program="", machines=False, within=120):
        place = {"WORLD_SIZE": f"{len(ranks)}", "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": f"{free_port()}", "LOCAL_WORLD_SIZE": f"{len(ranks)}"}
        folder = tmp_path_factory.mktemp("ranks")
        files = []
        for rank in range(len(ranks)):
            files.append([os.devnull, str(folder / f"{rank}.out"), str(folder / f"{rank}.err")])
            for path in files[-1][1:]:
                Path(path).touch()
        job = {"ranks": [[*map(str, flags)] for flags in ranks], "program": str(program)}
        job |= {"env": place, "files": files, "within": within, "machines": machines}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline())
        said = [[Path(path).read_text() for path in names[1:]] for names in files]
        return [(code, out, err) for code, (out, err) in zip(codes, said)]

    yield run
    process.stdin.close()
    process.wait(30)


def errors_of(err):
    return [line for line in err.splitlines() if line.startswith("error:")]


# ------------------------------------------------------------------------------------ the same logits


def hugging_face_folder(folder, sizes, files=1, **options):
    """A Hugging Face folder with the same numbers as the random checkpoint of these sizes and options."""
    meta = random_checkpoint(folder / "original", sizes, **options)
    weights = random_weights(read_params(meta), options.get("seed", 0), dtype=options["dtype"])
    params = read_params(meta)
    tensors = {}
    for name, w in weights.items():
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name.removesuffix(".weight").replace(f".{layer[1]}." if layer else "\0", ".{}.")
        (theirs,) = [names[1] for names in naming.NAMES if names[0] == pattern]
        if name.endswith(
            ("wq.weight", "wk.weight")
        ):  # the other way round: first all even rows, then all odd
            w = w.view(-1, params["head_dim"] // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        tensors[f"{theirs.format(layer and layer[1])}.weight"] = w.contiguous()
    names, where = sorted(tensors), {}
    for n in range(files):
        file = f"model-{n:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        save_file(
            {name: tensors[name] for name in names[n::files]}, folder / file, {"format": "pt"}
        )
        where |= dict.fromkeys(names[n::files], file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "model_type": "llama",
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "vocab_size": params["vocab_size"],
        "rms_norm_eps": params["norm_eps"],
        "intermediate_size": params["ffn_dim"],
        "rope_theta": params["rope_theta"],
        "max_position_embeddings": params["max_seq_len"],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": params["rope_scaling_factor"],
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (meta / "tokenizer.model").rename(folder / "tokenizer.model")
    for file in meta.iterdir():
        file.unlink()
    meta.rmdir()
    return folder


def llama_2_shards(folder):
    """The embedding cut along the model dim, as Llama 2's shards have it."""
    files = sorted(folder.glob("*.pth"))
    shards = [torch.load(file) for file in files]
    whole = torch.cat([shard["tok_embeddings.weight"] for shard in shards])
    for file, shard, part in zip(files, shards, whole.chunk(len(files), 1)):
        shard["tok_embeddings.weight"] = part.clone()
        torch.save(shard, file)
    return folder


def heads_held_twice(folder, sizes):
    """16 shards of a model with 8 key/value heads, each of which stands twice, as in 405B's release."""
    random_checkpoint(
        folder, sizes | {"n_heads": 16, "n_kv_heads": 16}, shards=16, dtype=torch.float32
    )
    files = sorted(folder.glob("*.pth"))
    for one, other in zip(files[::2], files[1::2]):
        first, second = torch.load(one), torch.load(other)
        for name in first:
            if name.endswith(("wk.weight", "wv.weight")):
                second[name] = first[name].clone()
        torch.save(second, other)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints in all layouts, in float32, by name."""
    root, dtype = tmp_path_factory.mktemp("parallel"), torch.float32
    many = SMALL | {"n_heads": 16, "n_kv_heads": 8}
    made = {
        f"{S} shards": random_checkpoint(root / f"s{S}", SMALL, S, dtype=dtype)
        for S in (1, 2, 4, 8)
    }
    for S in (1, 8):
        made[f"8 key/value heads, {S} shards"] = random_checkpoint(
            root / f"k{S}", many, S, dtype=dtype
        )
    made["16 shards, heads held twice"] = heads_held_twice(root / "twice", SMALL)
    made["tied"] = random_checkpoint(root / "tied", SMALL, 1, tied=True, dtype=dtype)
    made["tied, 2 shards"] = random_checkpoint(root / "tied2", SMALL, 2, tied=True, dtype=dtype)
    made["Llama 2's embedding"] = llama_2_shards(
        random_checkpoint(root / "two", SMALL, 4, dtype=dtype)
    )
    made["Hugging Face"] = hugging_face_folder(root / "hf", SMALL, dtype=dtype)
    made["Hugging Face, 3 files"] = hugging_face_folder(
        root / "hf3", many, files=3, dtype=dtype, seed=1
    )
    return made


def greedy(tokens, weights, params, new):
    cache = llama.make_cache(weights, params, len(tokens))
    logits = llama.prefill(tokens, weights, params, cache)
    at = torch.full((len(tokens),), tokens.shape[1])
    return torch.stack(
        list(itertools.islice(llama.generate(logits, weights, params, cache, at), new))
    )


TOKENS = some_tokens(SMALL, B=2, T=20)


@pytest.fixture(scope="module")
def of_one_process(folders):
    """The logits and the new tokens that one process gives, for every folder."""
    expected = {}
    for name, folder in folders.items():
        weights, params, _ = llama.load_model(folder)
        new = 100 if name == "1 shards" else 3
        with torch.no_grad():
            logits = llama.forward(TOKENS, weights, params)
        expected[name] = logits, greedy(TOKENS, weights, params, new)
    return expected


@pytest.mark.parametrize("N", [2, 4, 8])
def test_logits_and_tokens_are_those_of_one_process(folders, of_one_process, forks, tmp_path, N):
    """For every layout: fewer, as many and more processes than shards and than key/value heads."""
    many = {2: 100, 4: 30, 8: 8}[N]  # for one folder; the machine has fewer cores than 8
    news = {name: min(len(new), many) for name, (_, new) in of_one_process.items()}
    job = {"folders": {str(folders[name]): news[name] for name in news}, "tokens": TOKENS.tolist()}
    (tmp_path / "job").write_text(json.dumps(job))
    flags = (tmp_path / "job", tmp_path / "out")
    for code, _, err in forks(*[flags] * N, program=WORKER, within=300):
        assert code == 0, err
    found = load_file(tmp_path / "out")
    for n, (name, (logits, new)) in enumerate(of_one_process.items()):
        assert relative_error(found[f"{n}.logits"], logits) < 1e-6, name
        assert torch.equal(found[f"{n}.new"], new[: news[name]]), name


def test_processes_sum_in_float32(monkeypatch):
    """What wo and w2 gave in bfloat16: so it is rounded once more, not after each process."""
    seen = []
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda total: seen.append(total.dtype))
    params = llama.fill_params(SMALL)
    weights = random_weights(params, dtype=torch.bfloat16)
    together = parallel.meeting(llama.forward)(TOKENS, weights, params)
    assert seen == [torch.float32] * (2 * params["n_layers"] + 1)  # and the logits
    assert torch.equal(together, llama.forward(TOKENS, weights, params))


def test_each_process_holds_its_share_and_no_more(forks, tmp_path):
    """Resident memory after loading, of one file, of shards and of safetensors, from a model of 150 MB."""
    sizes = SMALL | {"dim": 1024, "n_layers": 4, "vocab_size": 8192, "n_heads": 8, "n_kv_heads": 8}
    folders = [
        random_checkpoint(tmp_path / "one", sizes),
        random_checkpoint(tmp_path / "eight", sizes, shards=8),
        hugging_face_folder(tmp_path / "hf", sizes, dtype=torch.bfloat16),
    ]
    job = {"folders": {str(folder): 0 for folder in folders}, "tokens": [[1]]}
    (tmp_path / "job").write_text(json.dumps(job))
    for code, _, err in forks(*[(tmp_path / "job", tmp_path / "out")] * 4, program=WORKER):
        assert code == 0, err
    weights = llama.load_model(folders[0])[0]
    whole = sum(w.nbytes for w in weights.values())
    own = whole / 4 + weights["tok_embeddings.weight"].nbytes * 3 / 4  # the embedding is everyone's
    for n, grown in load_file(tmp_path / "out").items():
        for resident, share in grown.tolist():
            assert own - 1e6 < share < own + 1e6
            assert resident < own + 0.15 * whole, (n, resident, share)


@pytest.mark.parametrize("N, S", [*itertools.product([2, 4, 8, 16], [1, 2, 4, 8]), (6, 1), (6, 2)])
def test_shares_joined_are_the_whole(N, S):
    """Without processes: every share cut and joined again, for more processes than can be started here."""
    sizes = SMALL | {
        "n_heads": 48,
        "n_kv_heads": 16 if N != 6 else 6,
        "ffn_dim": 96,
        "vocab_size": 768,
    }
    params = llama.fill_params(sizes | {"dim": 96})
    weights = random_weights(params, dtype=torch.float32)
    shards = {f"{n}": part for n, part in enumerate(split(weights, S))}
    layouts.check_shapes(shards, params)
    local = parallel.share_of_params(params, N)
    shares = [
        parallel.load_share(shards, local, "cpu", torch.float32, place=(rank, N))
        for rank in range(N)
    ]
    shapes = parallel.share_of_shapes(local, N)
    for name, whole in weights.items():
        dim = int(name.endswith(("attention.wo.weight", "feed_forward.w2.weight")))
        parts = [share[name] for share in shares]
        assert all(part.shape == shapes[name] for part in parts), name
        if whole.dim() == 1 or name == "tok_embeddings.weight":  # everyone has these whole
            assert all(torch.equal(part, whole) for part in parts), name
        elif name.endswith(
            ("wk.weight", "wv.weight")
        ):  # with more processes than heads, held by several
            each = max(1, N // params["n_kv_heads"])
            assert torch.equal(torch.cat(parts[::each]), whole), name
            assert all(torch.equal(part, parts[n // each * each]) for n, part in enumerate(parts))
        else:
            assert torch.equal(torch.cat(parts, dim), whole), name


def test_sizes_that_do_not_divide():
    for N in (3, 5, 7, 9, 16):
        with pytest.raises(ValueError, match=rf"{N} processes cannot share 8 heads.*: 1, 2, 4, 8$"):
            parallel.share_of_params(llama.fill_params(SMALL), N)


# ------------------------------------------------------------------------------------ the command line


def test_text_is_that_of_one_process(script):
    alone = script("Once upon a time", "--dtype", "float32", "--show", "none")
    code, out, err, _ = finished(
        torchrun(
            2, SCRIPT, "Once upon a time", "--dtype", "float32", "--show", "first", quick=False
        )
    )
    assert (code, out) == (0, alone.stdout), err
    assert (
        err.count("prompt of 5 tokens") == 1
        and "layers.0.attention.q          B H T E  1 4 5 32  float32" in err
        and "H 4 query heads" in err  # of its share
    )
    assert "one of 2 shares" in err


def test_one_process_under_torchrun_is_like_none(script):
    code, out, err, _ = finished(torchrun(1, SCRIPT, "Once upon a time", "--show", "none"))
    assert (code, out) == (0, script("Once upon a time", "--show", "none").stdout), err


def test_prompts_from_stdin_and_from_a_file(script, forks, tmp_path):
    prompts = "Once upon a time\nHi\n\u00e9\n"
    (tmp_path / "prompts").write_text(prompts)
    flags = ("--dtype", "float32", "--max-new-tokens", "20")
    alone = script("--prompts", tmp_path / "prompts", *flags).stdout
    code, out, err, _ = finished(torchrun(2, SCRIPT, "--prompts", "-", *flags), prompts)
    assert (code, out) == (0, alone), err
    (first, other) = forks(*[("--prompts", tmp_path / "prompts", *flags)] * 2)
    assert first[:2] == (0, alone) and other[:2] == (0, ""), first[2] + other[2]


def test_process_0_decides_what_is_drawn(forks, tmp_path):
    """Without a seed each process would draw something else; all must go on from the same tokens."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys; from parts import commandline as l, parallel\n"
        "import torch.distributed as dist\n"
        "answer, said = l.answer, []\n"
        "l.answer = lambda *given, **how: said.append(answer(*given, **how))\n"
        "def run(args):\n    l.run(args); all_said = [None, None]; dist.all_gather_object(all_said, said)\n"
        "    assert all_said[0] == all_said[1] and said[0], all_said\n"
        "flags = ['Hi', '--temperature', '9', '--max-new-tokens', '50', '--show', 'none']\n"
        "sys.exit(parallel.run_together(l.parse_arguments, flags, run))\n"
    )
    for code, _, err in forks((), (), program=worker, within=60):
        assert code == 0, err


def test_a_conversation_at_a_terminal():
    """Process 0 alone has the terminal; the others hear of each line, however long it takes to type."""
    terminal, ours = os.openpty()
    process = torchrun(2, SCRIPT, "--chat", "--show", "none", stdin=ours)
    os.close(ours)
    for line in (b"My name is Zoe.\n", b"What is my name?\n", b"\x04"):
        time.sleep(2)
        os.write(terminal, line)
    code, out, err, _ = finished(process)
    os.close(terminal)
    assert code == 0, err
    assert "Zoe" in out.splitlines()[-1] and err.count("Ctrl-D ends") == 1


def test_trace_is_that_of_one_process(script, folders, forks, tmp_path):
    folder, flags = folders["1 shards"], ("--show", "none", "--max-new-tokens", "0")
    script("Hi", "--weights", folder, "--save-trace", tmp_path / "one", *flags)
    trace = tmp_path / "four"
    for code, _, err in forks(*[("Hi", "--weights", folder, "--save-trace", trace, *flags)] * 4):
        assert code == 0, err
    one, four = load_file(tmp_path / "one"), load_file(trace)
    assert one.keys() == four.keys()
    for name in one:
        assert relative_error(four[name], one[name]) < 2e-6, name
    from safetensors import safe_open

    with safe_open(tmp_path / "one", "pt") as a, safe_open(trace, "pt") as b:
        assert a.metadata() == b.metadata()


def test_compiled(script):
    flags = ("Once upon a time", "--dtype", "float32", "--show", "none", "--max-new-tokens", "30")
    flags += ("--layers", "1")
    code, out, err, _ = finished(torchrun(2, SCRIPT, *flags, "--compile"), within=300)
    assert (code, out) == (0, script(*flags).stdout), err
    assert err.count("compiled the step") == 1


# ------------------------------------------------------------------------------------ what goes wrong


def test_one_clear_line(tmp_path, checkpoint, forks):
    """Errors that all processes find are told once, by process 0."""
    flags = ("Hi", "--sho", "all")
    code, out, err, errors = finished(torchrun(4, SCRIPT, *flags), within=60)
    assert code != 0 and not out and len(errors) == 1, err
    assert "unrecognized arguments: --sho all (is --show meant?)" in errors[0]
    for flags, message in (
        (("Hi", "--weights", tmp_path / "nothing"), "nothing: no such file or folder"),
        (
            ("Hi", "--weights", checkpoint(n_heads=6, n_kv_heads=6, dim=48)),
            "4 processes cannot share 6 heads",
        ),
    ):
        found = forks(*[flags] * 4, within=60)
        err = "".join(err for _, _, err in found)
        assert all(code != 0 and not out for code, out, _ in found)
        (error,) = errors_of(err)
        assert message in error, err
        assert "process " not in error.partition("cannot")[0].replace("4 processes", "")


@pytest.fixture
def endless(checkpoint):
    """The script and flags for a text that does not end: this random model repeats one token."""
    folder = checkpoint(max_seq_len=100_000)
    return SCRIPT, "Once", "--weights", folder, "--show", "none", "--max-new-tokens", "90000"


def started(process):
    """Waits until text comes, and returns its first letters."""
    return process.stdout.read(4)


def test_a_process_is_killed(endless):
    process = torchrun(2, *endless, quick=False)
    started(process)
    (pid,) = [pid for pid, rank in workers(process) if rank == 1]
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    code, _, err, errors = finished(process, within=60)
    assert code != 0 and time.monotonic() - began < 30 and len(errors) == 1, err
    assert re.search(
        "has lost another one, which may have been killed|another process has ended", errors[0]
    )


def test_a_world_that_nobody_meant(script, monkeypatch):
    given = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for env, message in (
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set, but RANK is not; torchrun sets all that is needed",
        ),
        (
            {"WORLD_SIZE": "x", **given},
            "WORLD_SIZE is 'x', expected a number from 1 to 1000000; torchrun sets it",
        ),
    ):
        for name in given:
            monkeypatch.delenv(name, raising=False)
        run = script("Hi", env=env)
        assert (run.returncode, run.stdout, run.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "\u0662"}, "WORLD_SIZE is '\u0662'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9999"),
        ({"RANK": "2"}, "RANK is '2', expected a number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', expected a number from 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing or empty"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE is 'many'"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3', expected a number from 1 to 2"),
    ],
)
def test_what_torchrun_would_never_set(script, changes, says):
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    result = script("Hi", env=given | {"MASTER_PORT": "1"} | changes)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"error: {says}")


def test_local_world_size_without_torchrun_is_nobodys_affair(script):
    result = script("Hi", "--max-new-tokens", 1, env={"LOCAL_WORLD_SIZE": "many"})
    assert result.returncode == 0


def test_help_is_told_once_and_quickly():
    code, out, err, errors = finished(torchrun(2, SCRIPT, "--help"), within=60)
    assert (code, errors) == (0, []) and out.count("usage:") == 1 and "answer" not in err


def test_a_mistake_of_ours_shows(forks, tmp_path):
    """Whichever process makes it: a traceback, not only that the others lost it."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import torch; from parts import commandline, parallel, processes\n"
        "def run(args):\n    assert processes()[0] == 0, 'a mistake'\n    torch.distributed.barrier()\n"
        "parallel.run_together(commandline.parse_arguments, ['Hi'], run)\n"
    )
    found = forks((), (), program=worker, within=60)
    err = "".join(err for _, _, err in found)
    assert all(code != 0 for code, _, _ in found)
    assert "AssertionError: a mistake" in err and len(errors_of(err)) == 1


def test_a_process_or_a_machine_hangs(endless):
    """One of two processes stops; and of two machines the first, with torchrun, which holds the store."""
    port = free_port()
    alone = torchrun(2, *endless, quick=False)
    first, second = (
        torchrun(1, *endless, nodes=2, node=n, port=port, quick=False) for n in range(2)
    )
    for process in (alone, first):
        started(process)
    (rank_1,) = [pid for pid, rank in workers(alone) if rank == 1]
    (rank_0,) = [pid for pid, _ in workers(first)]
    waiting = {"alone": [pid for pid, rank in workers(alone) if rank == 0], "second": [second.pid]}
    began, took = time.monotonic(), {}
    for pid in (rank_1, rank_0, first.pid):
        os.kill(pid, signal.SIGSTOP)
    while waiting.keys() - took.keys() and time.monotonic() - began < 60:
        time.sleep(0.2)
        for name, (pid,) in waiting.items():
            state = Path(f"/proc/{pid}/stat")
            if name not in took and (
                not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
            ):
                took[name] = time.monotonic() - began
    for pid in (rank_0, first.pid):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # torchrun ends it after 30 more seconds
        os.kill(rank_1, signal.SIGCONT)
    _, _, err, errors = finished(alone, within=60)
    assert errors == ["error: process 1 of 2 does not answer"] and took["alone"] < 30, err
    _, _, err, errors = finished(second, within=60)
    assert len(errors) == 1 and "answer" in errors[0] and took["second"] < 30, (took, err)
    finished(first)


def test_control_c(endless):
    process = torchrun(2, *endless, quick=False)
    started(process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, _, err, errors = finished(process, within=60)
    assert code != 0 and time.monotonic() - began < 30 and errors == ["error: interrupted"], err


def two_nodes(first, second, scripts=(SCRIPT, SCRIPT)):
    """Two torchruns on this machine, as if on two, with these flags: what `finished` gives of both."""
    port = free_port()
    nodes = [
        torchrun(1, scripts[n], *flags, nodes=2, node=n, port=port)
        for n, flags in enumerate((first, second))
    ]
    began = time.monotonic()
    found = [finished(node, within=90) for node in nodes]
    return found, time.monotonic() - began


def test_two_machines(script):
    flags = ("Once upon a time", "--dtype", "float32", "--show", "none")
    ((code, out, err, _), (other, nothing, _, _)), _ = two_nodes(flags, flags)
    assert (code, other, out, nothing) == (0, 0, script(*flags).stdout, ""), err


@pytest.mark.parametrize("fault", ["shard", "a matrix", "params", "flags", "program"])
def test_machines_that_differ(tmp_path, forks, fault):
    sizes = [SMALL, SMALL | ({"rope_theta": 10000.0} if fault == "params" else {})]
    here, there = (random_checkpoint(tmp_path / f"{n}", sizes[n], shards=2) for n in range(2))
    if fault == "shard":
        (there / "consolidated.01.pth").unlink()
    if fault == "a matrix":
        shard = torch.load(there / "consolidated.01.pth")
        shard["layers.1.feed_forward.w2.weight"][20:] *= 2
        torch.save(shard, there / "consolidated.01.pth")
    new = ["3", "4" if fault == "flags" else "3"]
    flags = [
        ("Hi", "--weights", folder, "--max-new-tokens", n) for folder, n in zip((here, there), new)
    ]
    if fault == "program":
        shutil.copytree(ROOT / "parts", tmp_path / "parts")
        other = tmp_path / SCRIPT.name
        other.write_text(SCRIPT.read_text() + "# another version\n")
        found, took = two_nodes(*flags, (SCRIPT, other))
    else:
        began = time.monotonic()
        found = [(*said, errors_of(said[2])) for said in forks(*flags, machines=True, within=90)]
        took = time.monotonic() - began
    expected = {
        "shard": r"process 1 of 2 on \S+: .*1/consolidated.0\d.pth|expected shape",
        "a matrix": r"process 1 on \S+ has another weights than process 0",
        "params": r"process 1 on \S+ has another params than process 0",
        "program": r"process 1 on \S+ has another version of this program than process 0",
        "flags": r"process 1 on \S+ has another --max-new-tokens than process 0",
    }[fault]
    assert took < 30
    for code, out, err, errors in found:
        assert code != 0 and not out and len(errors) == 1 and re.search(expected, errors[0]), err


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_shares_in_8_and_4_bits(script, forks, tmp_path, monkeypatch, kind):
    """Each share has the groups of the whole."""
    monkeypatch.setattr(llama, "forward", llama.forward)  # a quantized model takes its place
    folder = random_checkpoint(tmp_path / "tied", SMALL | {"ffn_dim": 256}, tied=True)
    flags = ["Hi", "--weights", folder, "--quantize", kind, "--dtype", "float32"]
    flags += ["--max-new-tokens", 5, "--save-trace"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    expected = script(*flags, alone, "--show", "none")
    (code, out, err), _ = forks(*[(*flags, together)] * 2)
    assert code == 0 and f" of {kind}\n" in err, err
    alone, together = load_file(alone), load_file(together)
    assert alone.keys() == together.keys()
    assert relative_error(together["logits"], alone["logits"]) < 1e-5
    assert out == expected.stdout
