"""The command line, run as a user runs it: streams, flags, modes, interruptions and mistakes."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    full_params,
    quick_python,
    read_params,
    relative_error,
    some_tokens,
)
from safetensors import safe_open
from safetensors.torch import load_file

import llama3_from_scratch as llama
from parts import commandline, inside
from tools.random_checkpoint import random_weights

SCRIPT = str(ROOT / "llama3_from_scratch.py")


def fresh(*arguments, python=None, **options):
    """The command line in a process of its own."""
    command = [python or quick_python(), SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


def test_the_first_command_anyone_runs():
    result = fresh("Once upon a time", python=sys.executable)
    assert result.returncode == 0
    assert len(result.stdout.split()) > 40 and result.stdout.endswith("\n")
    lines = result.stderr.splitlines()
    assert re.fullmatch(
        r".*weights/tiny: dim 256, 4 layers, 3.5 M parameters, 7 MB of bfloat16", lines[0]
    )
    assert re.fullmatch(
        r"Meta layout, 1 shard, RoPE scaling 8 \(as in Meta's code\), own head, cpu, \d+\.\d s",
        lines[1],
    )
    assert (
        lines[2].startswith("prompt of 5 tokens:  1024 '<|begin_of_text|>'")
        and "' upon'" in lines[2]
    )
    assert "layers.0.attention.q          B H T E  1 8 5 32  bfloat16" in lines
    assert "and the same in the other 3 layers" in lines and not any(
        "layers.2." in line for line in lines
    )
    assert "logits                        B 1 V    1 1 1280  float32" in lines
    assert "next: ',' >99.9%" in lines
    assert re.fullmatch(
        r"prefill 5 tokens, [\d.]+/s; decode \d+ tokens, [\d.]+/s; peak memory [\d.]+ GB",
        lines[-1],
    )


def test_show(script):
    shown = {
        which: script("Hi", "--show", which, "--max-new-tokens", 1).stderr
        for which in ("all", "first", "none")
    }
    row = r"^(\S+) +B [\w ]+ (?:\d|\"  )"  # with its shape, or that of the row above
    names = {which: re.findall(row, text, re.M) for which, text in shown.items()}
    assert len(names["all"]) == 4 + 4 * 17 and len(names["first"]) == 4 + 17 and not names["none"]
    assert len(shown["none"].splitlines()) == 4  # the report, the cut, the speed


def test_max_new_tokens(script):
    none, three = (
        script("Once upon a time", "--max-new-tokens", 0),
        script("Once upon a time", "--max-new-tokens", 3),
    )
    assert none.stdout == "" and "decode 0 tokens" in none.stderr and "logits" in none.stderr
    assert "decode 3 tokens" in three.stderr and "[cut at --max-new-tokens 3]" in three.stderr


def test_seed_and_sampling_flags(script):
    def text(*flags):
        return script("Once upon a time", "--max-new-tokens", 30, "--show", "none", *flags).stdout

    hot = ("--temperature", 1.5)
    assert text(*hot, "--seed", 1) == text(*hot, "--seed", 1) != text(*hot, "--seed", 2)
    assert (
        text()
        == text("--temperature", 0)
        == text(*hot, "--top-k", 1)
        == text(*hot, "--top-p", 1e-6)
    )
    assert text(*hot, "--seed", 1, "--top-k", 3) != text(*hot, "--seed", 1)


def test_sampling_draws_from_what_it_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]]).log_softmax(-1)

    def drawn(**options):
        generator = torch.Generator().manual_seed(0)
        ids = torch.cat([llama.sample(logits, generator=generator, **options) for _ in range(3000)])
        return ids.bincount(minlength=5) / 3000

    def near(*expected):
        return pytest.approx(expected, abs=0.03)

    p = logits.exp()[0].tolist()
    assert llama.sample(logits).item() == 4
    assert drawn(temperature=1.0).tolist() == near(*p)
    assert drawn(temperature=0.5).tolist() == near(*(logits[0] * 2).softmax(-1).tolist())
    assert drawn(temperature=1e-30).tolist() == near(0, 0, 0, 0, 1)
    assert drawn(temperature=1.0, top_k=2).tolist() == near(
        p[0] / (p[0] + p[4]), 0, 0, 0, p[4] / (p[0] + p[4])
    )
    assert drawn(temperature=1.0, top_k=99).tolist() == near(*p)
    assert drawn(temperature=1.0, top_p=p[4] - 0.01).tolist() == near(0, 0, 0, 0, 1)
    assert drawn(temperature=1.0, top_p=p[4] + 0.01).tolist() == near(
        p[0] / (p[0] + p[4]), 0, 0, 0, p[4] / (p[0] + p[4])
    )
    rows = llama.sample(
        logits.repeat(4, 1), temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert rows.shape == (4,)


def test_layers_and_dtype(script):
    two = script("Hi", "--layers", 2, "--max-new-tokens", 1)
    assert "2 of 4 layers" in two.stderr and "and the same in the other 1 layer\n" in two.stderr
    for dtype in ("float32", "float16", "bfloat16"):
        result = script("Hi", "--dtype", dtype, "--max-new-tokens", 1)
        assert result.returncode == 0 and f" MB of {dtype}\n" in result.stderr
        assert f"tok_embeddings                B T D    1 3 256   {dtype}\n" in result.stderr


def test_save_trace_holds_every_tensor(script, tmp_path):
    file = tmp_path / "t.safetensors"
    result = script("The answer", "--save-trace", file, "--max-new-tokens", 1, "--dtype", "float32")
    assert result.returncode == 0 and os.listdir(tmp_path) == ["t.safetensors"]
    trace = load_file(file)
    params = read_params(ROOT / "weights/tiny")
    beside = (
        8 + 2 + 4
    )  # the lens after attention and after each layer, rows of the head, attribution
    assert len(trace) == 4 + 17 * params["n_layers"] + beside
    T = trace["tokens"].shape[1]
    assert trace["logits"].shape == (1, T, 1280) and trace["layers.3.attention.scores"].shape == (
        1,
        8,
        T,
        T,
    )
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert (
        about["prompt"] == "The answer"
        and about["dtype"] == "float32"
        and about["weights"].endswith("weights/tiny")
    )
    assert '"dim": 256' in about["params"]
    weights, _, tokenizer = llama.load_model(ROOT / "weights/tiny", dtype=torch.float32)
    assert relative_error(llama.forward(trace["tokens"], weights, params), trace["logits"]) < 1e-6
    assert (
        f"{file}: {len(trace)} tensors" in result.stderr
        and "viewer.html in a browser" in result.stderr
    )

    # The logit lens: of the last layer it is the model's own prediction, of an earlier one that of a model
    # which ends there.
    assert trace["lens.ids"].shape == trace["lens.probs"].shape == (params["n_layers"], 1, T, 10)
    for i in range(params["n_layers"]):
        logits = llama.forward(trace["tokens"], weights, params | {"n_layers": i + 1})
        assert torch.allclose(
            logits.softmax(-1).gather(-1, trace["lens.ids"][i]), trace["lens.probs"][i], atol=1e-6
        )
        assert torch.allclose(logits.softmax(-1).topk(10).values, trace["lens.probs"][i], atol=1e-6)
    texts = json.loads(about["texts"])
    assert texts[str(int(trace["tokens"][0, 1]))] == tokenizer.decode([int(trace["tokens"][0, 1])])
    assert {*map(str, trace["lens.ids"].unique().tolist())} <= texts.keys()


def test_standard_input(script):
    said = script("Once upon a time", "--show", "none").stdout
    assert script("--show", "none", input="Once upon a time\n").stdout == said
    assert script("--show", "none", input="Once upon a time").stdout == said
    asked = script("--chat", "--show", "none", "What do llamas eat?").stdout
    assert script("--chat", "--show", "none", input="What do llamas eat?\n").stdout == asked


def test_emoji_and_chinese(script):
    for text in ("Hello 🦙👩‍👩‍👧‍👦", "你好"):
        result = script(text, "--max-new-tokens", 5)
        assert result.returncode == 0 and "prompt of" in result.stderr


def test_a_character_is_held_back_until_it_is_whole(capsys, monkeypatch):
    """A model that says a llama, then China, byte by byte: each arrives whole, and only then."""
    tokenizer = llama.load_tokenizer(ROOT / "weights/tiny/tokenizer.model")
    said = [tokenizer.encode_single_token(bytes([b])) for b in "a🦙中é!".encode()]
    monkeypatch.setattr(llama, "prefill", lambda *_, **__: torch.zeros(1))
    pieces = []
    monkeypatch.setattr(
        "builtins.print", lambda *text, file=None, **_: file or pieces.append(text[0])
    )
    args = commandline.parse_arguments(["x", "--show", "none"])
    model = None, {"max_seq_len": 99}, tokenizer
    how = {"model": model, "args": args, "watched": None, "prefill": llama.prefill}
    how["go_on"] = lambda *_: iter(said[:-1])
    commandline.answer([1], None, 0, **how)
    assert [piece for piece in pieces if piece] == ["a", "🦙", "中", "é"]


def test_stops_on_every_stop_token(monkeypatch):
    tokenizer = llama.load_tokenizer(ROOT / "weights/tiny/tokenizer.model")
    monkeypatch.setattr(llama, "prefill", lambda *_, **__: torch.zeros(1))
    for name in ("end_of_text", "eot_id", "eom_id"):
        said = [65, llama.special(tokenizer, name), 66]
        model, args = (
            (None, {"max_seq_len": 99}, tokenizer),
            commandline.parse_arguments(["x", "--show", "none"]),
        )
        how = {
            "model": model,
            "args": args,
            "watched": None,
            "prefill": llama.prefill,
            "go_on": lambda *_, said=said: iter(said),
        }
        new = commandline.answer([1], None, 0, **how)
        assert new == said[:2]


def test_says_so_when_the_context_is_full(script, checkpoint):
    folder = checkpoint(max_seq_len=20)
    result = script("abc", "--weights", folder, "--show", "none")
    assert (
        "[the context of 20 tokens is full]" in result.stderr
        and "decode 16 tokens" in result.stderr
    )
    result = script("a" * 20, "--weights", folder)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        "error: the prompt has 21 tokens, the context only 20",
    )


def test_many_tokens_greedy_equal_the_pass_without_a_cache(model):
    params, weights = model()
    tokens = some_tokens(params, B=2, T=7)
    params, cache = params | {"max_seq_len": 60}, llama.make_cache(weights, params, 2)
    logits = llama.prefill(tokens, weights, params, cache)
    new = torch.stack(list(llama.generate(logits, weights, params, cache, torch.tensor([7, 7]))), 1)
    assert new.shape == (2, 53)
    whole = llama.forward(torch.cat([tokens, new], 1), weights, params)
    assert torch.equal(whole[:, 6:-1].argmax(-1), new)


def test_a_long_prompt_does_not_need_much_memory(tmp_path):
    """3,072 tokens in one go: the scores alone would take 8 heads x 3072 x 3072 x (4 + 4) bytes."""
    code = (
        "import torch; from pathlib import Path; from conftest import *;"
        "params = full_params(Path({tmp!r}), n_layers=1); weights = random_weights(params);"
        "tokens = some_tokens(params, B=1, T=3072); cache = llama.make_cache(weights, params, 1, 3072);"
        "llama.prefill(tokens[:, :64], weights, params, cache);"
        "peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if 'VmHWM' in l);"
        "before = peak();"
        "llama.prefill(tokens, weights, params, cache); print((peak() - before) / 1e3);"
        "llama.forward(tokens, weights, params, cache); print((peak() - before) / 1e3)"
    )
    run = subprocess.run(
        [quick_python(), "-c", code.format(tmp=str(tmp_path))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert run.returncode == 0, run.stderr
    in_chunks, at_once = map(float, run.stdout.split())
    assert in_chunks < 200 < 300 < at_once  # MB


class Terminal:
    """A pseudo-terminal with the script on it."""

    def __init__(self, *arguments):
        python = quick_python()
        self.process, self.fd = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execv(python, [python, SCRIPT, *arguments])
        self.seen = ""

    def until(self, text, seconds=60):
        deadline = time.time() + seconds
        while not re.search(text, self.seen):
            if not select.select([self.fd], [], [], max(0, deadline - time.time()))[0]:
                raise AssertionError(f"no {text!r} in {self.seen!r}")
            try:
                self.seen += os.read(self.fd, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:
                break
            self.seen = re.sub("\x1b\\[\\?2004(h|l\r)", "", self.seen)  # readline's, around a line
        seen, self.seen = self.seen, ""
        return seen

    def type(self, text):
        os.write(self.fd, text.encode())

    def ended(self):
        self.until(r"\Z(?!)", 30)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_conversation_on_a_terminal_reuses_its_cache():
    terminal = Terminal("--chat", "--show", "none")
    terminal.until(r"> $")
    terminal.type("My name is Ada.\n")
    first = terminal.until(r"peak memory.*\n> $")
    assert "Ada" in first.split("\n", 1)[1]
    terminal.type("\n")  # nothing typed: asked again
    terminal.until(r"> $")
    terminal.type("What is my name?\n")
    second = terminal.until(r"peak memory.*\n> $")
    assert "Ada" in second
    read = [int(re.search(r"prefill (\d+) tokens", text)[1]) for text in (first, second)]
    assert (
        read[1] < read[0] + 5
    )  # the second turn read its own question, not the conversation again
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_without_a_prompt_a_terminal_is_asked_again_and_again():
    terminal = Terminal("--max-new-tokens", "5")
    terminal.until(r"> $")
    for _ in range(2):
        terminal.type("Once upon a time\n")
        assert re.search(r"\nOnce upon a time, .*\n", terminal.until(r"peak memory.*\n> $"))
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_odd_lines_do_not_end_a_conversation():
    """Ctrl-D in the middle of a line ends the line, and bytes that are no text are one line of error."""
    terminal = Terminal("--max-new-tokens", "5", "--show", "none")
    terminal.until(r"> $")
    os.write(terminal.fd, b"Once \xff upon\n")
    assert "error: the prompt is not valid UTF-8" in terminal.until(r"error.*\n> $")
    terminal.type("Once upon a time\x04")
    assert "Once upon a time, " in terminal.until(r"peak memory.*\n> $")
    terminal.type("Once\n")
    terminal.until(r"peak memory.*\n> $")
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_ctrl_c_keeps_what_was_written(checkpoint):
    process = subprocess.Popen(
        [
            quick_python(),
            SCRIPT,
            "Hi",
            "--weights",
            checkpoint(max_seq_len=100_000),
            "--show",
            "none",
            "--max-new-tokens",
            "90000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_a_closed_pipe_ends_quietly(checkpoint):
    folder = checkpoint(max_seq_len=100_000)
    flags = f"Hi --weights {folder} --show none --max-new-tokens 90000"
    command = f"{quick_python()} {SCRIPT} {flags} | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, timeout=100)
    assert (
        len(result.stdout) == 5
        and b"Traceback" not in result.stderr
        and b"rror" not in result.stderr
    )


def test_break_at_stops_in_forwards_own_frame():
    commands = "p scores.shape, 'q' in locals(), 'heads' in locals()\np i\nc\n"
    result = fresh(
        "Hello", "--break-at", "layers.0.attention.scores", "--show", "none", input=commands
    )
    assert result.returncode == 0
    assert re.search(r"llama3_from_scratch.py\(\d+\)forward\(\)\n-> probs = ", result.stdout)
    assert re.search(r"\(torch.Size\(\[1, 8, (\d), \1\]\), True, False\)", result.stdout)
    assert result.stdout.count("(Pdb)") == 3  # once for each command: no second stop


def test_break_at_patterns_and_pythonbreakpoint(script, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import sys\ndef stop():\n    f = sys._getframe(1)\n"
        "    print(f.f_code.co_name, f.f_lineno, f.f_locals.get('i'))\n"
    )
    flags = (
        "--break-at",
        "layers.*.attention.probs",
        "--break-at",
        "logits",
        "--show",
        "none",
        "--max-new-tokens",
        0,
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = script("Hello", *flags, env={"PYTHONBREAKPOINT": "mine.stop"})
    lines = (ROOT / "llama3_from_scratch.py").read_text().splitlines()
    stops = [line.split() for line in result.stdout.splitlines()]
    assert [(name, i) for name, _, i in stops] == [("forward", str(i)) for i in (0, 1, 2, 3, 3)]
    assert all("probe(" in lines[int(line) - 1] for _, line, _ in stops)  # the file's own lines
    assert script("Hello", *flags, env={"PYTHONBREAKPOINT": "0"}).stdout == ""
    assert fresh("Hello", *flags, input="q\n").returncode == 0


def test_chunked_prompt_shows_its_last_chunk(model, capsys, monkeypatch):
    params, weights = model()
    import functools

    watched = functools.partial(llama.forward, probe=llama.show_shapes("first", params["n_layers"]))
    cache = llama.make_cache(weights, params, 1, 11)
    monkeypatch.setattr(llama, "chunk_size", lambda *_: 4)
    llama.prefill(some_tokens(params, B=1), weights, params, cache, watched=watched)
    shown = capsys.readouterr().err
    assert (
        "layers.0.attention.scores        B H T S  torch.float32   1 8 3 11\n" in shown
        and shown.count("tok_embeddings") == 1
    )


MISTAKES = {
    "unknown flag": (["x", "--colour"], "--colour"),
    "half a flag": (["x", "--max", "3"], "--max"),
    "no number": (["x", "--top-k", "many"], "--top-k"),
    "negative": (["x", "--max-new-tokens", "-1"], "must be from 0"),
    "temperature": (["x", "--temperature", "nan"], "--temperature nan"),
    "top-p": (["x", "--top-p", "1.5"], "--top-p 1.5"),
    "top-p below 0": (["x", "--top-p", "-0.1"], "--top-p -0.1: must be from 0 to 1 ("),
    "seed": (["x", "--seed", "-1"], "--seed -1"),
    "layers": (["x", "--layers", "5"], "has 4 layers, 5 are asked for"),
    "no layers": (["x", "--layers", "0"], "--layers 0"),
    "system": (["x", "--system", "y"], "--system needs --chat"),
    "dtype": (["x", "--dtype", "int8"], "--dtype"),
    "device": (["x", "--device", "cuda"], "--device cuda"),
    "folder": (["x", "--weights", "nowhere"], "nowhere: no such file or folder"),
    "empty": ([""], "the prompt is empty"),
    "break-at": (["x", "--break-at", "layers.9.out"], "layers.9.out"),
    "trace": (["x", "--save-trace", "/nowhere/t.safetensors"], "/nowhere/t.safetensors"),
    "two": (["x", "y"], "y"),
}


@pytest.mark.parametrize("arguments, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(script, arguments, says):
    if arguments[1:2] == ["--device"] and torch.cuda.is_available():
        arguments = ["x", "--device", "mps"]
        says = "--device mps"
    result = script(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0] and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]


def test_bytes_that_are_no_utf8(script):
    result = script("--show", "none", input=b"\xff\xfe hello")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == "error: the prompt is not valid UTF-8"
    run = subprocess.run(
        [quick_python().encode(), SCRIPT.encode(), b"\xff"], capture_output=True, cwd=ROOT
    )
    assert run.returncode == 2 and b"error: the prompt is not valid UTF-8" in run.stderr
    assert script(input="").returncode == 2


def test_a_full_disk_leaves_no_half_trace(tmp_path, monkeypatch, model):
    params, weights = model()
    tokenizer = llama.load_tokenizer(ROOT / "weights/tiny/tokenizer.model")
    target = tmp_path / "t.safetensors"

    def fail(trace, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inside.safetensors, "serialize_file", fail)
    with pytest.raises(ValueError, match="No space left"):
        inside.save_trace(
            target, some_tokens(params), (weights, params, tokenizer), {"weights": "x"}
        )
    assert not list(tmp_path.glob("t.*"))


def test_help_has_an_example_for_each_job(script):
    help = script("--help")
    assert help.returncode == 0
    for word in ("Once upon a time", "--chat", "--weights", "--break-at", "--save-trace"):
        assert re.search(rf"    python llama3_from_scratch.py .*{word}", help.stdout)


def test_tokenizer_of_another_size(script, checkpoint):
    folder = checkpoint()
    (folder / "tokenizer.model").write_bytes((ROOT / "weights/tiny/tokenizer.model").read_bytes())
    result = script("x", "--weights", folder)
    assert (
        result.returncode == 2
        and "the tokenizer has 1280 tokens, but vocab_size is 512" in result.stderr
    )


def test_sharded_checkpoint_says_the_same(script, checkpoint):
    one, four = checkpoint("one", n_kv_heads=4), checkpoint("four", shards=4, n_kv_heads=4)
    texts = [script("Hello", "--weights", folder, "--show", "none") for folder in (one, four)]
    assert texts[0].stdout == texts[1].stdout != "" and "4 shards" in texts[1].stderr
    assert SMALL["n_kv_heads"] == 2 and random_weights(full_params(one / "p"), 0)


def test_many_prompts(script, tmp_path):
    lines = [
        "Once upon a time",
        "the answer to the ultimate question of life, the universe, and everything is ",
        "Long ago",
    ] * 12
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    flags = ("--dtype", "float32", "--max-new-tokens", 40, "--show", "none")
    result = script("--prompts", tmp_path / "prompts.txt", *flags)
    assert result.returncode == 0
    streamed = [json.loads(line) for line in result.stdout.splitlines()]
    answers = sorted(streamed, key=lambda answer: answer.pop("index"))
    assert [answer["prompt"] for answer in answers] == lines
    ended = [len(answer["tokens"]) for answer in streamed[:32]]
    assert ended == sorted(ended) and streamed != answers  # the shortest first
    for answer in answers[:3]:
        alone = script(answer["prompt"], *flags)
        assert alone.stdout == answer["text"] + "\n"
        assert answer["finish_reason"] == ("length" if "[cut at" in alone.stderr else "stop")
    assert answers[0] == answers[33] and {answer["finish_reason"] for answer in answers} == {
        "length",
        "stop",
    }
    assert (
        script("--prompts", "-", *flags, input="\ufeff" + "\r\n".join(lines)).stdout
        == result.stdout
    )
    assert len(script("--prompts", "-", *flags, input="a\x0bb\u2028c\nd\n").stdout.split("\n")) == 3
    assert script("--prompts", "-", "--save-trace", "t", input="a").returncode == 2
    chat = script(
        "--prompts", "-", "--chat", *flags, input="What do llamas eat?\nWhat is 3 plus 4?"
    )
    said = {answer["index"]: answer["text"] for answer in map(json.loads, chat.stdout.splitlines())}
    assert said == {0: "Llamas eat grass and hay.", 1: "3 plus 4 is 7."}


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "error: --prompts -: no prompt is in it; it takes one a line"),
        ("\n  \n\n", "error: --prompts -: no prompt is in it; it takes one a line"),
        ("a\n\n" + "b" * 99, "line 3: the prompt has 100"),
    ],
)
def test_bad_prompts_are_named(script, checkpoint, content, says):
    result = script("--prompts", "-", "--weights", checkpoint(max_seq_len=20), input=content)
    assert (result.returncode, result.stdout) == (2, "") and says in result.stderr


def test_a_trace_takes_nobodys_place(script, checkpoint, tmp_path):
    folder = checkpoint()
    os.mkfifo(tmp_path / "pipe")
    for target in (
        folder / "consolidated.00.pth",
        folder / "params.json",
        tmp_path / "pipe",
        tmp_path,
    ):
        before = sorted(tmp_path.rglob("*"))
        result = script("Hi", "--weights", folder, "--save-trace", target)
        assert result.returncode == 2 and "would take the place of something else" in result.stderr
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):  # a trace may take the place of a trace
        assert (
            script("Hi", "--save-trace", tmp_path / "link", "--max-new-tokens", 0).returncode == 0
        )
    assert (tmp_path / "link").is_symlink() and load_file(tmp_path / "real")
    assert (tmp_path / "real").stat().st_mode & 0o044  # as readable as other new files


def test_a_mistake_does_not_end_a_conversation(checkpoint):
    terminal = Terminal(
        "--weights", str(checkpoint(max_seq_len=30)), "--max-new-tokens", "3", "--show", "none"
    )
    terminal.until(r"> $")
    terminal.type("a" * 99 + "\n")
    assert "error: the prompt has 100 tokens, the context only 30" in terminal.until(
        r"error.*\n> $"
    )
    terminal.type("abc\n")
    terminal.until(r"peak memory.*\n> $")
    terminal.type("\x04")
    assert terminal.ended() == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(closed):
    command = f"{quick_python()} {SCRIPT} Hi --max-new-tokens 2 {closed}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert "Meta layout" not in result.stdout


def test_ctrl_c_before_anything_happened():
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "Hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(0.3)  # while torch is being imported
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b""


def test_a_pipe_gets_utf8_whatever_the_locale_says(tmp_path):
    """An ASCII locale, where streams are told cp1252: JSON lines, text, shapes and prompts are UTF-8."""
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    locale |= {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffHé “🦊”\n".encode())
    code = (
        "import sys, llama3_from_scratch as l;"
        "codes = [l.main([*prompt, '--max-new-tokens', '1']) for prompt in (['--prompts', sys.argv[1]],"
        " [sys.argv[2]])]; print('\\xe9\\U0001f999'); print('\\xe9\\U0001f999', file=sys.stderr);"
        "sys.exit(any(codes))"
    )
    command = [sys.executable, "-c", code, prompts, "🦙é"]
    result = subprocess.run(command, capture_output=True, env=os.environ | locale)
    assert result.returncode == 0 and b"codec" not in result.stderr, result.stderr
    lines = result.stdout.decode("utf-8").splitlines()
    assert json.loads(lines[0])["prompt"] == "Hé “🦊”" and lines[-1] == "é🦙"
    assert result.stderr.decode("utf-8").endswith("é🦙\n")
    assert b"prompt of 7 tokens" in result.stderr  # six bytes, not twelve letters of another locale


def test_out_of_memory_is_one_line(script, monkeypatch):
    def fail(*_):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"
        )

    monkeypatch.setattr(llama, "make_cache", fail)
    result = script("Hi")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(
        "error: DefaultCPUAllocator: can't"
    )


def test_the_cache_grows_in_large_steps(script, monkeypatch):
    sizes, grow = [], llama.grow
    monkeypatch.setattr(llama, "grow", lambda cache, S: sizes.append(S) or grow(cache, S))
    script("Once upon a time", "--max-new-tokens", 20, "--device", "cpu")
    assert sizes == [5, 5 + 128]


def test_random_checkpoint_says_what_does_not_fit(tmp_path, capsys):
    from tools.random_checkpoint import main

    for arguments in (["small", tmp_path / "a", "--shards", "3"], ["small", tmp_path / "b", "--shards", "0"],
                      ["huge", tmp_path / "c"], ["small", SCRIPT], [SCRIPT, tmp_path / "d"]):  # fmt: skip
        assert main([*map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
    for shards, files in ((4, 4), (2, 2)):
        assert main(["small", str(tmp_path / "e"), "--shards", str(shards)]) == 0
        assert len(list((tmp_path / "e").glob("*.pth"))) == files


def test_all_of_a_conversation_is_in_its_cache(script, monkeypatch):
    """After three turns, one of them cut short, keys and values are those of one pass over it all."""
    turns, answer = [], commandline.answer

    def watched(ids, cache, *rest, model, **how):
        new = answer(ids, cache, *rest, model=model, **how)
        turns.append((ids + new, cache, model))
        return new

    monkeypatch.setattr(commandline, "answer", watched)
    typed = "Tell me a story.\nMy name is Ada.\nWhat is my name?\n"
    result = script(
        "--chat", "--dtype", "float32", "--max-new-tokens", 12, input=typed, terminal=True
    )
    assert result.returncode == 0 and len(turns) == 3 and "[cut at" in result.stderr
    ids, cache, (weights, params, _) = turns[-1]
    fresh = llama.make_cache(weights, params, 1, len(ids) - 1)
    llama.prefill(torch.tensor([ids[:-1]]), weights, params, fresh)
    for found, expected in zip(cache, fresh):
        for x, y in zip(found, expected):
            assert relative_error(x[:, :, : len(ids) - 1], y) < 1e-5


def test_a_row_that_fills_the_context_does_not_stop_the_others(checkpoint, script):
    folder = checkpoint(max_seq_len=40, dtype=torch.float32)
    flags = ["--weights", folder, "--max-new-tokens", 25, "--show", "none"]
    prompts = ["a" * 30, "b", "c" * 39, "d" * 12]  # 31, 2, 40 and 13 tokens
    result = script("--prompts", "-", *flags, input="\n".join(prompts) + "\n")
    rows = sorted(map(json.loads, result.stdout.splitlines()), key=lambda row: row["index"])
    assert [row["finish_reason"] for row in rows] == ["context", "length", "context", "length"]
    assert [len(row["tokens"]) for row in rows] == [9, 25, 0, 25]
    for prompt, row in zip(prompts, rows):
        alone = script("--prompts", "-", *flags, input=prompt + "\n").stdout
        assert json.loads(alone)["tokens"] == row["tokens"]


def test_a_full_conversation_begins_anew(checkpoint, script):
    folder = checkpoint(max_seq_len=60)
    typed = "\n".join(["Hello"] * 6) + "\n"
    flags = ["--chat", "--weights", folder, "--max-new-tokens", 9]
    result = script(*flags, input=typed, terminal=True)
    assert result.returncode == 0 and "begins anew" in result.stderr
    assert result.stderr.count("decode 9 tokens") >= 3


def test_composed_probes_compile():
    """Also one that knows tensors around it: so processes that share a quantized model compile their step."""

    def run(x):
        more = x + 1

        def added(name, dims, tensor):
            return tensor + more

        return inside.compose(added)("h", "D", x)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), run(torch.ones(2)))


def test_probes_compose(model, capsys, monkeypatch):
    """Print, record and break in one pass; what one of them changes, the next ones see."""
    params, weights = model()
    trace, stops = {}, []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(len(trace)))

    def halved(name, dims, tensor):
        return tensor / 2 if name == "layers.0.attention.heads" else tensor

    shown, stop = (
        llama.show_shapes("all", params["n_layers"]),
        inside.break_at("layers.1.*.scores", "norm"),
    )
    probe = inside.compose(halved, shown, inside.record(trace), stop)
    logits = llama.forward(some_tokens(params), weights, params, probe=probe)
    assert torch.equal(trace["logits"], logits) and len(trace) == 4 + 17 * params["n_layers"]
    assert len(stops) == 2 and list(trace)[stops[0] - 1] == "layers.1.attention.scores"
    assert capsys.readouterr().err.count("B H T E") == 3 * params["n_layers"]
    plain = {}
    llama.forward(some_tokens(params), weights, params, probe=inside.record(plain))
    assert torch.equal(trace["layers.0.attention.heads"] * 2, plain["layers.0.attention.heads"])
