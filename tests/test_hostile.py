"""What nobody would send on purpose, and somebody does: one line, within memory, nothing lost."""

import filecmp
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, quick_python, some_tokens, traced
from safetensors.torch import save_file

import llama3_from_scratch as llama
from parts import CONTROL, for_screen, naming, printable
from parts.files import local_path, written_whole
from parts.programs import run_program
from tools import bench, compare, random_checkpoint
from weights import train_tiny

TINY = str(ROOT / "weights" / "tiny")


def one_line(capsys, code, *says):
    """Exit code 2, and one line of error that holds these words, no control characters, and has an end."""
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "") and len(errors) == 1 and err.splitlines()[-1] == errors[0], err[
        :999
    ]
    assert len(errors[0]) < 2500 and not CONTROL.search(errors[0]), errors[0][:999]
    for words in says:
        assert words in errors[0], errors[0]


# ------------------------------------------------------------------------------------ traces


@pytest.fixture(scope="module")
def trace():
    """A right trace of weights/tiny for six tokens, a few of its tensors."""
    model = llama.load_model(quiet=True)
    tokens = torch.tensor([[768, 72, 101, 108, 108, 111]])
    names = ("tokens", "tok_embeddings", "layers.0.attention.scores", "norm", "logits")
    whole = traced(tokens, {name: w.float() for name, w in model[0].items()}, model[1])
    return {name: whole[name].contiguous() for name in names}


def header_of(path, change):
    """Rewrites the JSON in front of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = change(json.loads(content[8 : 8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def with_shape(shape):
    def change(header):
        header["norm"]["shape"] = shape
        return header

    return change


ODD_TENSORS = {
    "no tensors": (lambda t: {}, "which tokens?"),
    "only tokens": (lambda t: {"tokens": t["tokens"]}, "no tensor has a name"),
    "tokens without a dim": (lambda t: t | {"tokens": torch.tensor(5)}, "tokens is torch.int64 ()"),
    "tokens of two rows": (lambda t: t | {"tokens": t["tokens"].repeat(2, 1)}, "(2, 6)"),
    "tokens that are real": (lambda t: t | {"tokens": t["tokens"].double()}, "torch.float64"),
    "tokens that are true or false": (lambda t: t | {"tokens": t["tokens"] > 3}, "torch.bool"),
    "tokens out of range": (
        lambda t: t | {"tokens": t["tokens"] + 10**9},
        "not those of this model",
    ),
    "negative tokens": (lambda t: t | {"tokens": -t["tokens"]}, "not those of this model"),
    "tokens without end": (
        lambda t: t | {"tokens": torch.zeros(1, 400_000, dtype=torch.int32)},
        "to compare 400,000 tokens takes",
    ),
    "embeddings of one dim": (
        lambda t: {"tok_embeddings": torch.ones(6), "norm": t["norm"]},
        "which tokens?",
    ),
    "a number": (lambda t: t | {"norm": torch.tensor(1.0)}, "norm has shape ()"),
    "eight dims": (lambda t: t | {"norm": t["norm"][(None,) * 5]}, "norm has shape (1, 1"),
    "eight bits": (lambda t: t | {"norm": t["norm"].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    "complex numbers": (lambda t: t | {"norm": t["norm"].to(torch.complex64)}, "complex64"),
    "bytes": (lambda t: t | {"norm": t["norm"].to(torch.uint8)}, "torch.uint8"),
    "nothing in it": (
        lambda t: t | {"norm": torch.empty(1, 0, 256)},
        "norm is torch.float32 (1, 0",
    ),
    "NaN": (lambda t: t | {"norm": t["norm"] * math.nan}, "norm holds nan at [0, 0, 0]"),
    "infinite scores": (
        lambda t: t | {"layers.0.attention.scores": t["layers.0.attention.scores"] * math.nan},
        "holds nan",
    ),
    "an escape in a name": (
        lambda t: {"tokens": t["tokens"], "\x1b]0;x\x07": t["norm"]},
        "\\x1b]0;x\\x07",
    ),
    "a name of a megabyte": (
        lambda t: {"tokens": t["tokens"], "n" * 10**6: t["norm"]},
        "nnn […] nnn",
    ),
}


@pytest.mark.parametrize("what", ODD_TENSORS)
def test_odd_traces(trace, tmp_path, capsys, what):
    change, says = ODD_TENSORS[what]
    save_file({name: x.clone() for name, x in change(trace).items()}, tmp_path / "t.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_line(capsys, compare.main([str(tmp_path / "t.safetensors")]), says)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    "about, says",
    [
        ({"params": "no"}, "params in its metadata is no JSON"),
        ({"params": "[" * 10**5}, "params in its metadata is no JSON"),
        ({"params": "[1]"}, "params in its metadata is [1], no object"),
        (
            {"params": '{"n_layers": -1}'},
            "n_layers in its metadata is -1, expected a number from 1",
        ),
        ({"params": '{"n_layers": true}'}, "n_layers in its metadata is True"),
        ({"params": '{"n_layers": 99}'}, "has 4 layers, 99 are asked for"),
        ({"params": '{"n_layers": [[1]]}'}, "n_layers in its metadata is [[1]]"),
        (
            {"params": '{"use_scaled_rope": 1, "rope_scaling_factor": NaN}'},
            "rope_scaling_factor in its metadata is nan",
        ),
        (
            {"params": '{"use_scaled_rope": 1, "rope_scaling_factor": 1e400}'},
            "rope_scaling_factor in its metadata is inf",
        ),
        ({"dtype": "\x1b[2J"}, "dtype in its metadata is '\\x1b[2J', expected one of float32"),
        ({"dtype": "x" * 10**6}, "expected one of float32"),
    ],
)
def test_odd_metadata(trace, tmp_path, capsys, about, says):
    save_file(trace, tmp_path / "t.safetensors", metadata=about)
    one_line(capsys, compare.main([str(tmp_path / "t.safetensors")]), says)


@pytest.mark.parametrize(
    "change",
    [
        with_shape([10**9, 10**9]),
        with_shape([-1, 256]),
        with_shape([1.5]),
        with_shape("all"),
        lambda header: b"{",
        lambda header: b"[]",
        lambda header: header | {"norm": header["norm"] | {"dtype": "F999"}},
        lambda header: header | {"norm": header["norm"] | {"data_offsets": [0, 10**15]}},
        lambda header: b"[" * 10**5,
    ],
)
def test_odd_headers(trace, tmp_path, capsys, change):
    save_file(trace, tmp_path / "t.safetensors")
    header_of(tmp_path / "t.safetensors", change)
    one_line(capsys, compare.main([str(tmp_path / "t.safetensors")]), "not a safetensors file")


def test_a_pass_that_overflows_is_no_reference(tmp_path, capsys, checkpoint):
    """Weights so large that float16 is infinite: random tensors once agreed with that to 1.4."""
    folder = checkpoint(dtype=torch.float32)
    shard = torch.load(folder / "consolidated.00.pth")
    for name in shard:
        if name.endswith("w2.weight"):
            shard[name] *= 1e6
    torch.save(shard, folder / "consolidated.00.pth")
    tokens = some_tokens(SMALL, B=1)
    theirs = {"tokens": tokens, "norm": torch.randn(1, tokens.shape[1], 64)}
    save_file(theirs, tmp_path / "t.safetensors")
    flags = [str(tmp_path / "t.safetensors"), "--weights", str(folder), "--dtype", "float16"]
    one_line(capsys, compare.main(flags), "the script's own pass overflows: layers.0.feed_forward")
    shard["norm.weight"].fill_(3e38)
    torch.save(shard, folder / "consolidated.00.pth")
    one_line(capsys, compare.main(flags[:3]), "is not finite in the script's own pass")


def test_no_tolerance_is_above_the_cap(trace, tmp_path, capsys):
    save_file(trace, tmp_path / "t.safetensors")
    for tolerance in ("0.2", "inf", "nan", "1e999", "-1"):
        flags = [str(tmp_path / "t.safetensors"), "--tolerance", tolerance]
        one_line(capsys, compare.main(flags), "--tolerance must be a number above 0, at most 0.1")


# ------------------------------------------------------------------------------------ texts


def test_printable_and_for_screen(capsys):
    class Terminal:
        isatty = staticmethod(lambda: True)

    rude = "\x1b]0;title\x07 \x9b2J \x7f \u202eabc\u2066 \udcff"
    assert printable(rude) == r"\x1b]0;title\x07 \x9b2J \x7f \u202eabc\u2066 \udcff"
    assert printable("a\nb\tc\r") == r"a\nb\tc\r" and printable("Ünïcode 字 🦙") == "Ünïcode 字 🦙"
    long = printable("x" * 10**7 + " the end")
    assert len(long) < 1600 and long.endswith(" the end")
    assert for_screen("a\n\tb\r\nc\rd\x1b[1m", Terminal) == "a\n\tb\r\nc\\u000dd\\u001b[1m"
    assert for_screen("👨‍👩‍👧 שלום\u200f", Terminal) == "👨‍👩‍👧 שלום\u200f"
    Terminal.isatty = staticmethod(lambda: False)
    assert for_screen(rude, Terminal) == rude


# ------------------------------------------------------------------------------------ nothing is lost


def test_random_checkpoint_leaves_others_files_alone(tmp_path, capsys):
    make, folder = random_checkpoint.main, tmp_path / "own"
    assert make(["small", str(folder), "--shards", "2"]) == 0
    assert make(["small", str(folder)]) == 0  # its own it may replace
    names = {"params.json", "tokenizer.model", "consolidated.00.pth", random_checkpoint.MARK}
    assert {path.name for path in folder.iterdir()} == names
    capsys.readouterr()
    (folder / "consolidated.01.pth").write_bytes(b"years of work")
    one_line(
        capsys, make(["small", str(folder)]), "consolidated.01.pth there is not of this program"
    )
    (folder / "consolidated.01.pth").rename(folder / "consolidated.00.pth")
    one_line(
        capsys, make(["small", str(folder)]), "consolidated.00.pth there is not of this program"
    )
    assert (folder / "consolidated.00.pth").read_bytes() == b"years of work"
    tiny = tmp_path / "tiny"
    shutil.copytree(TINY, tiny)
    one_line(capsys, make(["small", str(tiny)]), "is not of this program")
    assert not filecmp.dircmp(TINY, tiny).diff_files


@pytest.mark.parametrize(
    "params, says",
    [
        ("[]", "expected a JSON object, found a list"),
        ("{", "expected a JSON object"),
        ("{}", "dim is missing"),
        ("[" * 10**5, "expected a JSON object"),
        (json.dumps(SMALL | {"dim": 10**6, "n_layers": 1000}), "GB of memory"),
        (json.dumps(SMALL | {"vocab_size": 3}), "vocab_size is 3, expected"),
        (json.dumps(SMALL | {"dim": -64}), "dim is -64"),
        (json.dumps(SMALL | {"n_heads": 7}), "do not fit together"),
        (json.dumps(SMALL | {"\u001b]0;x": 1}), r"\x1b]0;x is not supported"),
        (json.dumps(SMALL | {"norm_eps": "x" * 10**6}), "norm_eps is 'xxx"),
    ],
)
def test_params_that_make_no_sense_for_a_random_checkpoint(tmp_path, capsys, params, says):
    (tmp_path / "p.json").write_text(params)
    code = random_checkpoint.main([str(tmp_path / "p.json"), str(tmp_path / "new")])
    one_line(capsys, code, says)
    assert not (tmp_path / "new").exists()


def test_training_takes_no_other_models_place(tmp_path, capsys):
    pytest.importorskip("regex")
    from weights import train_tiny

    random_checkpoint.random_checkpoint(tmp_path / "other", SMALL)
    before = (tmp_path / "other" / "params.json").read_bytes()
    one_line(capsys, train_tiny.main(["--out", str(tmp_path / "other")]), "is of another model")
    assert (tmp_path / "other" / "params.json").read_bytes() == before


def test_a_trace_leaves_a_users_part_alone(script, tmp_path):
    (tmp_path / "t.safetensors.part").write_text("mine")
    flags = ("--max-new-tokens", 0, "--show", "none")
    assert script("Hi", "--save-trace", tmp_path / "t.safetensors", *flags).returncode == 0
    assert (tmp_path / "t.safetensors.part").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t.safetensors",
        "t.safetensors.part",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_while_a_file_is_written(tmp_path, number):
    """In the middle of a write: nothing half-written is left, and what was there is as it was."""

    def work():
        with written_whole(tmp_path / "t") as part:
            part.write_bytes(b"half")
            os.kill(os.getpid(), number)
            time.sleep(5)

    (tmp_path / "t").write_text("before")
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    try:
        assert run_program(work) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_while_torch_writes(tmp_path, capsys, number):
    """PyTorch makes a RuntimeError of whatever stops it there."""

    def work():
        with written_whole(tmp_path / "t") as part, open(part, "wb") as file:

            class Stopped:
                def write(self, block):
                    if len(block) > 9999:
                        os.kill(os.getpid(), number)
                    return file.write(block)

                flush = file.flush

            torch.save({"a": torch.zeros(10_000)}, Stopped())

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run_program(work) == 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [*tmp_path.iterdir()] and capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "no folder"])
def test_no_file_takes_the_place_of_something_else(tmp_path, kind):
    target = {"device": Path("/dev/null"), "no folder": tmp_path / "no" / "t"}.get(
        kind, tmp_path / "t"
    )
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    with pytest.raises(ValueError, match=kind):
        with written_whole(target):
            raise AssertionError("it was opened")
    assert not [*tmp_path.glob(".*")] and Path("/dev/null").is_char_device()


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with written_whole(tmp_path / "link") as part:
        part.write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "x"


def test_a_device_or_a_pipe_in_place_of_a_file(tmp_path, capsys, monkeypatch):
    """Refused at once: nothing is read, waited for, or measured for hours."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "t.safetensors").write_bytes(b"")
    for program, arguments in (
        (llama, ["--prompts", "/dev/zero"]),
        (llama, ["--prompts", "."]),
        (llama, ["Hi", "--weights", "pipe"]),
        (llama, ["Hi", "--weights", "gs://x/y", "--cache-dir", "pipe"]),
        (compare, ["pipe"]),
        (compare, ["/dev/zero"]),
        (compare, ["t.safetensors", "--map", "pipe"]),
        (random_checkpoint, ["pipe", "x"]),
        (random_checkpoint, ["small", "pipe"]),
        (random_checkpoint, ["small", "x", "--tokenizer", "pipe"]),
        (bench, [TINY, "--json", "/dev/null"]),
        (bench, [TINY, "--chart", "pipe"]),
        (train_tiny, ["--out", "pipe"]),
    ):
        assert program.main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert re.fullmatch(r"error: .*(device|not a f|neither a file|a folder).*\n", err), err
    assert sorted(os.listdir()) == ["pipe", "t.safetensors"]


def test_prompts_from_a_shells_pipe():
    command = shlex.join([sys.executable, "llama3_from_scratch.py", "--max-new-tokens", "1"])
    run = shell(f"{command} --prompts <(printf '\\xef\\xbb\\xbfHi\\n')")
    assert run.returncode == 0 and json.loads(run.stdout)["prompt"] == "Hi"


# ------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "path, says",
    [
        ("~nobody-here/x", "not a path"),
        ("gs:/x", "gs:/x: is a bucket meant? It has two slashes"),
        ("x" * 5000, "the name is too long"),
        ("loop/a", "links that lead in a circle"),
        ("file/a", "a file, where a folder is expected"),
        ("none", "no such file"),
        ("\x1b[2J", r"\x1b[2J: no such file"),
        ("none\udcff", r"none\udcff: no such file"),
    ],
)
def test_paths_that_lead_nowhere(script, tmp_path, capsys, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    result = script("Hi", "--weights", path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ") and says in result.stderr, result.stderr
    assert not CONTROL.search(result.stderr) and len(result.stderr) < 2500
    for tool in (compare.main, lambda flags: random_checkpoint.main([*flags, "new"])):
        code = tool([path])
        one_line(capsys, code)
    if path.startswith(("x", "loop", "file")):
        result = script("Hi", "--save-trace", path)
        assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    with pytest.raises(ValueError):
        local_path("a\0b")


def test_a_link_in_a_circle_is_no_place_for_a_trace(script, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    result = script("Hi", "--save-trace", tmp_path / "loop")
    assert result.returncode == 2 and "cannot be written" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("temperature", ["1e-46", "1e-320", "1e-38", "5e-324"])
def test_temperatures_too_small_to_divide_by(script, temperature):
    cold, none = (
        script("Once", "--max-new-tokens", 5, "--show", "none", "--temperature", x)
        for x in (temperature, 0)
    )
    assert cold.returncode == 0 and cold.stdout == none.stdout


# ------------------------------------------------------------------------------------ .pth files


def endless():
    """A tuple that holds itself twice, forty times over: to print it would take for ever."""
    knot = ()
    for _ in range(40):
        knot = (knot, knot)
    return knot


W = torch.ones(3, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are a prototype
    NESTED = torch.nested.nested_tensor([W, W])
ODD_PTH = {
    "a bare tensor": (W, "holds a Tensor without names"),
    "a list": ([W], "holds a list without names"),
    "numbers for keys": ({1: W}, "names is of the type int"),
    "bytes for keys": ({b"norm.weight": W}, "names is of the type bytes"),
    "a tuple for a key": ({((1, 2), ((3,),)): W}, "names is of the type tuple"),
    "an endless value": ({"norm.weight": endless()}, "norm.weight holds a tuple"),
    "an endless file": (endless(), "holds a tuple"),
    "a deep value": ({"norm.weight": [[[[1]]]]}, "norm.weight holds a list"),
    "a name of a megabyte": ({"n" * 10**6: W}, ""),
    "an escape in a name": ({"\x1b]0;x\x07": W}, ""),
    "a nested tensor": ({"norm.weight": NESTED}, ""),
    "scalars": ({"tok_embeddings.weight": torch.tensor(1.0)}, ""),
}


@pytest.mark.parametrize("name", ["consolidated.00.pth", "llama3.2-1B-instruct.pth"])
@pytest.mark.parametrize("what", ODD_PTH)
def test_odd_pth_files(checkpoint, script, name, what, monkeypatch):
    held, says = ODD_PTH[what]
    folder = checkpoint()
    if " in a name" in what or "a name of" in what:  # beside what has to be there
        held = torch.load(folder / "consolidated.00.pth") | held
    (folder / "consolidated.00.pth").unlink()
    torch.save(held, folder / name)
    result = script("Hi", "--weights", folder)
    errors = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (2, "") and errors[-1].startswith("error: ")
    assert len(errors[-1]) < 2500 and not CONTROL.search(errors[-1]) and says in errors[-1]
    if name.startswith("consolidated"):
        assert "nnn […] nnn" in errors[-1] or r"\x1b]0;x\x07" in errors[-1] or "name" not in what
        monkeypatch.setattr(llama, "PARTS", False)
        alone = script("Hi", "--weights", folder)
        assert (alone.returncode, alone.stdout) == (2, "") and "\x1b" not in alone.stderr
        assert len(alone.stderr) < 2500


def test_scalars_in_rasbts_layout(checkpoint, script):
    folder = checkpoint()
    (folder / "consolidated.00.pth").unlink()
    ones = torch.tensor(1.0)
    names = ("att.W_key", "att.W_query", "ff.fc1")
    held = {"tok_emb.weight": torch.ones(512, 64)}
    held |= {f"trf_blocks.0.{name}.weight": ones for name in names}
    torch.save(held, folder / "llama3.2-1B.pth")
    result = script("Hi", "--weights", folder)
    assert result.returncode == 2 and "attention_norm.weight: expected shape (64,)" in result.stderr
    (folder / "params.json").unlink()  # then the tensors have to tell the sizes
    result = script("Hi", "--weights", folder)
    assert result.returncode == 2 and "a tensor is missing or misshapen" in result.stderr


def test_a_scalar_among_whole_tensors(checkpoint, script):
    """Its rows would be brought into another order before anybody multiplies with it."""
    folder = checkpoint()
    table = {metas: theirs for metas, _, theirs in naming.NAMES}
    held = {}
    for name, w in torch.load(folder / "consolidated.00.pth").items():
        pattern, layer = naming.split_name(name)
        held[f"{table[pattern].format(layer)}.weight"] = w
    (folder / "consolidated.00.pth").unlink()
    held["trf_blocks.0.att.W_query.weight"] = torch.tensor(1.0)
    torch.save(held, folder / "llama3.2-1B.pth")
    result = script("Hi", "--weights", folder)
    said = "layers.0.attention.wq.weight: expected shape (64, 64) for 1 of 1 shards, found ()"
    assert result.returncode == 2 and said in result.stderr


# ------------------------------------------------------------------------------------ the last flush

TOOLS = {
    "script": ["llama3_from_scratch.py", "Hi", "--max-new-tokens", "3", "--show", "none"],
    "help": ["llama3_from_scratch.py", "--help"],
    "scale": ["tools/scale.py"],
    "list": ["weights/download.py", "--list"],
    "bench": ["tools/bench.py", "--help"],
}


def shell(command, **options):
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=100, **options
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("tool", ["script", "help", "list", "compare"])
def test_a_full_disk(trace, tmp_path, tool):
    command = TOOLS.get(tool)
    if tool == "compare":
        save_file(trace, tmp_path / "t.safetensors")
        command = ["tools/compare.py", str(tmp_path / "t.safetensors")]
    python = sys.executable if tool == "compare" else quick_python()
    run = shell(shlex.join([python, *command]) + " > /dev/full")
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 2 and "Traceback" not in run.stderr and "Exception" not in run.stderr
    assert last == "error: standard output cannot be written (No space left on device)"


@pytest.mark.parametrize("tool", ["help", "list"])
def test_a_reader_that_has_gone(tool):
    run = shell(shlex.join([quick_python(), *TOOLS[tool]]) + " | true; exit ${PIPESTATUS[0]}")
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("tool", ["script", "bench"])
def test_ctrl_c_at_any_moment(tool):
    """Whenever it comes, once the program's own lines run: no words of Python's own."""
    for after in (0.3, 1.5):
        command = [sys.executable, *TOOLS[tool]]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and maps.exists() and "libtorch" not in maps.read_text():
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err and "rror" not in err, err
        # in its last moment Python itself has let go of all signals
        assert process.returncode in (0, 130, -signal.SIGINT)


def test_without_docstrings_and_asserts():
    """python -OO leaves both out."""
    run = shell(shlex.join([sys.executable, "-OO", *TOOLS["script"]]))
    assert run.returncode == 0 and "rror" not in run.stderr and run.stdout
