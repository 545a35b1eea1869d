"""What people see: asserted is what stands on a terminal's screen (pyte's), or comes out of a pipe."""

import io
import json
import os
import re
import sys
import time

import pexpect
import pyte
import pytest
import torch
from conftest import ROOT, quick_python

import llama3_from_scratch as llama
from parts import commandline, progress, span, table

SCRIPT = str(ROOT / "llama3_from_scratch.py")
DOCSTRING = llama.__doc__


class Terminal(io.TextIOBase):
    """stdout and stderr of a process on a terminal: both end on one screen."""

    encoding = "utf-8"

    def __init__(self, columns):
        self.columns, self.raw = columns, ""
        self.screen = pyte.HistoryScreen(columns, 200)
        self.stream = pyte.Stream(self.screen)

    def isatty(self):
        return True

    def write(self, text):
        self.raw += text
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def lines(self):
        rows = [line.rstrip() for line in self.screen.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def colours(self, row):
        """The colour of each letter of a row, or "dim" where pyte has no word for it."""
        cells = self.screen.buffer[row]
        return [cells[n].fg for n in range(self.columns)]


@pytest.fixture
def terminal(monkeypatch):
    """terminal(*arguments, columns=80, typed="") -> (exit code, Terminal) of the command line."""
    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(*arguments, columns=80, env=()):
        screen = Terminal(columns)
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            for name, value in dict(env).items():
                patch.setenv(name, value)
            for name in ("stdout", "stderr"):
                patch.setattr(sys, name, screen)
            code = llama.main([*map(str, arguments)])
        return code, screen

    return run


@pytest.fixture
def at_once(monkeypatch):
    """Progress is drawn from the first moment on."""
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setattr(progress, "TURN", 0.01)


def a_while(what, seconds=0.05):
    """The function, made slow enough for a line of progress to be drawn."""

    def slow(*arguments, **options):
        time.sleep(seconds)
        return what(*arguments, **options)

    return slow


# ------------------------------------------------------------------------------------ the first run


@pytest.mark.parametrize("columns", [80, 120])
def test_the_first_run_on_a_screen(terminal, columns):
    code, screen = terminal("Once upon a time", "--max-new-tokens", 8, columns=columns)
    rows = screen.lines()
    assert code == 0
    assert rows[0].endswith("weights/tiny: dim 256, 4 layers, 3.5 M parameters, 7 MB of bfloat16")
    assert re.fullmatch(
        r"Meta layout, 1 shard, RoPE scaling 8 \(as in Meta's code\), .* s", rows[1]
    )
    for written in re.sub(r"\x1b\[\d*m", "", screen.raw).split("\n"):
        assert len(written) <= columns  # so nothing was broken by the terminal
    key = next(n for n, row in enumerate(rows) if row.startswith("B 1 batch"))
    prompt = " ".join(rows[2:key])
    assert re.sub(" +", " ", prompt) == (
        "prompt of 5 tokens: 1024 '<|begin_of_text|>' 379 'Once' 381 ' upon' 256 ' a' 383 ' time'"
    )
    assert key == (4 if columns == 80 else 3)  # it takes two lines of 80
    head = next(
        n for n, row in enumerate(rows) if row.split() == ["tensor", "dims", "shape", "dtype"]
    )
    assert head - key == (3 if columns == 80 else 2)
    assert re.sub(" +", " ", " ".join(rows[key:head])) == (
        "B 1 batch T 5 new tokens S 5 positions they see D 256 model dim H 8 query heads "
        "K 2 key/value heads E 32 head dim F 704 feed-forward dim V 1280 vocabulary"
    )
    assert "next: ',' >99.9%" in rows
    (text,) = [row for row in rows if row.startswith("Once upon a time")]
    assert text.startswith("Once upon a time, there was")
    assert rows[-2] == "[cut at --max-new-tokens 8]"
    assert re.fullmatch(
        r"prefill 5 tokens, [\d.,]+/s; decode 8 tokens, [\d.,]+/s; peak memory [\d.]+ GB", rows[-1]
    )


def test_columns_and_colours_follow_the_letters(terminal):
    """H becomes D: the letter and its size have one colour, in the key, in dims and in shape."""
    _, screen = terminal("Once upon a time", "--max-new-tokens", 0)
    rows = screen.lines()
    head = next(n for n, row in enumerate(rows) if row.startswith("tensor"))
    at = {word: rows[head].index(word) for word in ("dims", "shape", "dtype")}
    seen = {}
    for n in range(head + 1, len(rows)):
        if not re.match(r"(layers\.|tok|norm|logits)", rows[n]):
            continue
        dims = rows[n][at["dims"] : at["shape"]].split()
        shape = rows[n][at["shape"] : at["dtype"]].split()
        assert rows[n][at["dtype"] - 1] == " " != rows[n][at["dtype"]]
        colours, column = screen.colours(n), at["dims"]
        for letter in dims:
            seen.setdefault(letter, set()).add(colours[column])
            column += len(letter) + 1
        if shape == ['"']:
            continue
        column = at["shape"]
        for letter, number in zip(dims, shape):
            assert {*colours[column : column + len(number)]} == seen[letter], (rows[n], letter)
            column += len(number) + 1
    assert all(len(found) == 1 for found in seen.values())
    hues = [seen[letter].copy().pop() for letter in "DHKEFVS"]
    assert len({*hues}) == 7 and "default" not in hues
    key = next(n for n, row in enumerate(rows) if row.startswith("H 8 query heads"))
    assert screen.colours(key)[0] in seen["H"] and screen.colours(key)[6] == "default"


def test_a_shape_like_the_one_above_reads_as_such(script):
    rows = script("Once upon a time", "--show", "all", "--max-new-tokens", 0).stderr.splitlines()
    rows = rows[next(n for n, row in enumerate(rows) if row.startswith("tensor ")) + 1 :]
    params = llama.load_model(quiet=True)[1]
    L = params["n_layers"]
    found, above = {}, None
    for row in rows[: 4 + 17 * L]:
        name, dims, shape, *dtype = re.split(r"  +", row)
        if shape == '"':
            assert dtype == ['"'] and above[0] == dims, row
        else:
            assert above != (dims, shape, dtype), f"{row}: it is that of the row above"
            above = dims, shape, dtype
        found[name] = above
    trace, sizes = {}, {"T": 5}

    def probe(name, dims, tensor):
        trace[name] = dims, " ".join(map(str, tensor.shape)), [str(tensor.dtype)[6:]]
        return tensor

    weights, params, tokenizer = llama.load_model(quiet=True)
    ids = [[*vars(tokenizer)["begin"], *llama.encode(tokenizer, "Once upon a time")]]
    llama.forward(torch.tensor(ids), weights, params, probe=probe)
    for name in ("norm", "logits"):  # of the last token alone
        trace[name] = (
            trace[name][0].replace("T", "1"),
            trace[name][1].replace(" 5 ", " 1 "),
            trace[name][2],
        )
    assert found == trace and sizes


def test_the_key_is_that_of_the_script():
    for letter, words in table.KEY.items():
        assert re.search(rf"(?<!\w){letter} {re.escape(words)}", DOCSTRING), letter
    assert table.KEY.keys() == table.COLOURS.keys() == {*"BTSDHKEFV"}


@pytest.mark.parametrize(
    "params, T",
    [
        (
            {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256},
            256,
        ),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}, 9),
    ],
)
def test_aligned_for_any_model(capsys, params, T):
    """405B, a chunk of a prompt of 131,072 tokens: tensors of the right shapes, without numbers."""
    params = llama.fill_params(params | {"head_dim": 128})
    sizes = {"B": 1, "T": T, "S": 131072, "D": params["dim"], "F": params["ffn_dim"]}
    sizes |= {"H": params["n_heads"], "K": params["n_kv_heads"], "E": 128, "V": 128256, "1": 1}
    probe = table.shape_table("all", params, 131072)
    for name, dims in (
        ("tokens", "B T"), ("tok_embeddings", "B T D"), ("layers.125.attention.q_rotated", "B H T E"),
        ("layers.125.attention.scores", "B H T S"), ("layers.9.feed_forward.hidden", "B T F"),
        ("logits", "B 1 V"),
    ):  # fmt: skip
        if params["n_layers"] == 32:
            name = name.replace("125", "31")
        probe(name, dims, torch.empty([sizes[letter] for letter in dims.split()], device="meta"))
    rows = capsys.readouterr().err.splitlines()
    rows = rows[next(n for n, row in enumerate(rows) if row.startswith("tensor")) :]
    starts = {
        tuple(cell.start() for cell in re.finditer(r"(?<!\S)\S+( \S+)*", row)) for row in rows
    }
    assert len(starts) == 1 and max(map(len, rows)) <= 80


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_wide_letters_and_long_prompts_are_folded(terminal, columns):
    prompt = (
        "你好，世界！骆驼 is a llama, and 🦙 is one too; however long it is, it stays in its lines"
    )
    _, screen = terminal(prompt, "--max-new-tokens", 0, columns=columns)
    written = re.sub(r"\x1b\[\d*m", "", screen.raw).split("\n")
    start = next(n for n, line in enumerate(written) if line.startswith("prompt of"))
    end = next(n for n, line in enumerate(written) if line.startswith("B 1 batch"))
    assert end - start > 1 and all(line.startswith("  ") for line in written[start + 1 : end])
    assert max(map(table.columns, written[start:end])) <= columns


# ------------------------------------------------------------------------------------ colours


def test_no_colours_where_none_are_wanted(terminal, script):
    flags = ("Hi", "--max-new-tokens", 1)
    assert "\x1b" in terminal(*flags)[1].raw
    assert "\x1b" not in terminal(*flags, env={"NO_COLOR": "1"})[1].raw
    assert "\x1b" in terminal(*flags, env={"NO_COLOR": ""})[1].raw
    assert "\x1b" in terminal(*flags, "--color", "always", env={"NO_COLOR": "1"})[1].raw
    assert "\x1b" not in terminal(*flags, "--color", "never")[1].raw
    assert "\x1b" not in terminal(*flags, env={"TERM": "dumb"})[1].raw
    piped = script(*flags)
    assert "\x1b" not in piped.stderr + piped.stdout
    coloured = script(*flags, "--color", "always")
    assert "\x1b[36m" in coloured.stderr and "\x1b" not in coloured.stdout
    assert (
        re.sub(r"\x1b\[\d*m", "", coloured.stderr).splitlines()[3:-1]
        == piped.stderr.splitlines()[3:-1]
    )


# ------------------------------------------------------------------------------------ progress


def soon(true, seconds=20):
    """Waits until something is true, on a machine that may be busy."""
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline
        time.sleep(0.01)


def test_progress_is_gone_when_done(monkeypatch, at_once):
    screen = Terminal(80)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)

    def last():
        return (screen.lines() or [""])[-1]

    print("before")
    done = r"reading weights: 100%\|█+\| 4.00G/4.00G \[\d\d:\d\d<00:00, [\d.]+GB/s\]"
    with progress.progress("reading weights", 4e9, "B") as advance:
        for n in range(1, 5):
            advance(1e9)
            soon(lambda n=n: last().startswith(f"reading weights: {25 * n:3}%"))
        assert re.match(done, last()) and len(last()) < 80
        with progress.set_aside():
            print("a line in between")
            time.sleep(0.05)
            assert screen.lines() == ["before", "a line in between"]
        soon(lambda: re.match(done, last()))
        assert len(screen.lines()) == 3
        with progress.progress("something within"):
            soon(lambda: last() == "something within … 0 s")
        soon(lambda: last().startswith("reading weights: "))
    print("after")
    assert screen.lines() == ["before", "a line in between", "after"]
    assert not progress.OPEN and not progress.DRAWN


def test_progress_without_tqdm_is_a_counter(monkeypatch, at_once):
    screen = Terminal(40)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(KeyboardInterrupt):
        with progress.progress("reading the prompt", 9002, "tok") as advance:
            advance(4501)
            time.sleep(0.05)
            assert screen.lines() == ["reading the prompt: 50% … 0 s"]
            raise KeyboardInterrupt
    assert screen.lines() == []


def test_no_progress_in_a_pipe_nor_within_a_second(monkeypatch, capsys):
    monkeypatch.setattr(progress, "TURN", 0.001)
    screen = Terminal(80)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        with progress.progress("short", 9, "tok"):
            time.sleep(0.05)
    assert screen.raw == ""
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.progress("in a pipe", 9, "tok"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_long_prompt_and_its_weights_show_progress(terminal, checkpoint, monkeypatch, at_once):
    """Converted from float32 and read in chunks: drawn meanwhile, gone at the end, the text untouched."""
    folder = checkpoint(dtype=torch.float32)
    monkeypatch.setattr(llama, "chunk_size", lambda *_: 16)
    monkeypatch.setattr(llama, "rms_norm", a_while(llama.rms_norm, 0.01))
    monkeypatch.setattr(llama, "joined", a_while(llama.joined))
    prompt = "a" * 90
    flags = ("--weights", folder, "--dtype", "bfloat16", "--max-new-tokens", 3)
    code, screen = terminal(prompt, *flags, "--show", "none")
    assert code == 0
    assert re.search(r"\rreading .*?: +\d+%\|.*B/s\]", screen.raw)
    assert re.search(r"\rreading the prompt: +\d+%\|.* \d+/91 \[.* tok/s\]", screen.raw)
    rows = "\n".join(screen.lines())
    assert "reading" not in rows and "a" * 79 in rows
    shown = terminal(prompt, *flags)[1]
    rows = shown.lines()
    assert not any("reading" in row for row in rows)
    head = next(n for n, row in enumerate(rows) if row.startswith("tensor"))
    assert rows[head + 1].split() == ["tokens", "B", "T", "1", "11", "int64"]  # the last chunk
    assert any("S 91 positions" in row for row in rows)
    drawn = {int(n) for n in re.findall(r"reading the prompt: .* (\d+)/91 \[", shown.raw)}
    assert drawn - {*range(0, 91, 16), 91}, "it stands still within a chunk"


def test_a_very_long_prompt_is_not_all_repeated(terminal):
    code, screen = terminal("a b " * 400, "--show", "none", "--max-new-tokens", 1)
    assert code == 0 and screen.lines()[2].startswith("… ") and len(screen.lines()) < 10


def test_a_copy_from_a_bucket_shows_progress(checkpoint, tmp_path, monkeypatch, at_once):
    from parts import remote

    folder = checkpoint(shards=2)
    names = [file.name for file in folder.iterdir()]
    stats = {name: (folder / name).stat() for name in names}
    stat = {name: remote.blobfile.Stat(s.st_size, 0, 0, None, None) for name, s in stats.items()}
    here = {"listdir": lambda url: names, "stat": a_while(lambda url: stat[url.rsplit("/", 1)[-1]])}
    here["BlobFile"] = lambda url, *_, **__: open(folder / url.rsplit("/", 1)[-1], "rb")
    for name, function in here.items():
        monkeypatch.setattr(remote.blobfile, name, function)
    screen = Terminal(100)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", screen)
    remote.cached_copy("gs://bucket/llama", str(tmp_path / "cache"))
    total = sum(s.st_size for s in stats.values())
    assert re.search(r"copying gs://bucket/llama: +\d+%\|.*B/s\]", screen.raw)
    (line,) = [row for row in screen.lines() if row.startswith("gs://")]
    assert line.startswith(f"gs://bucket/llama: {table.size(total)} copied to ")
    assert "copying" not in "".join(screen.lines())


# ------------------------------------------------------------------------------------ --compile


@pytest.fixture
def as_if_compiled(monkeypatch):
    """Where the compiler would stand, forward itself, after a while."""
    from parts import compiled

    made = []

    def compiled_forward(form):
        made.append(form)
        first = [0.05]

        def run(*arguments):
            time.sleep(first.pop() if first else 0)
            return llama.forward(*arguments)

        return run

    monkeypatch.setattr(compiled, "compiled_forward", compiled_forward)
    return made


def test_compiling_comes_before_the_text_and_has_its_own_words(
    terminal, script, as_if_compiled, at_once, monkeypatch
):
    from parts import compiled

    prepare = compiled.prepare
    # A step that is not compiled, on a busy machine, may have taken long.
    monkeypatch.setattr(compiled, "prepare", lambda *given: (prepare(*given)[0], 0.0))
    flags = ("Once upon a time", "--max-new-tokens", 12, "--show", "none", "--compile")
    _, screen = terminal(*flags)
    rows = screen.lines()
    assert "\rcompiling the step … 0 s" in screen.raw
    assert re.fullmatch(r"compiled the step in \d s", rows[2])
    assert rows[3].startswith("Once upon a time, there was a") and not any(
        "compiling the" in row for row in rows
    )
    assert re.fullmatch(r"\[compiling took \d s and saved nothing in this run\]", rows[-1])
    piped = script(*flags)
    plain = script(*flags[:-1])
    assert piped.stdout == plain.stdout
    lines = piped.stderr.splitlines()
    assert re.fullmatch(r"compiled the step in \d s", lines[2]) and "\r" not in piped.stderr
    speed = re.compile(r"[\d.,]+/s|[\d.]+ GB")
    assert speed.sub("", lines[4]) == speed.sub("", plain.stderr.splitlines()[3])
    idle = script(*flags[:1], "--max-new-tokens", 1, "--compile")
    assert idle.stderr.startswith("--compile does nothing here: ") and len(as_if_compiled) == 2


def test_what_lies_far_is_compiled_before_the_text_too(script, as_if_compiled, monkeypatch):
    """A text that goes past FAR positions: of one prompt, and of a conversation that gets there."""
    from parts import compiled

    monkeypatch.setattr(compiled, "FAR", 600)
    flags = ("--show", "none", "--compile", "--dtype", "float32")
    result = script("Once upon a time", "--max-new-tokens", 700, *flags)
    assert len(as_if_compiled) == 2
    lines = result.stderr.splitlines()
    said = r"compiled the step in \d s\ncompiled the step beyond 600 positions in \d s"
    assert re.fullmatch(said, "\n".join(lines[2:4]))
    plain = script("Once upon a time", *flags[:2], *flags[3:])
    assert result.stdout == plain.stdout and result.stdout.endswith("friends.\n")
    as_if_compiled.clear()
    typed = "Hello\n" + "What is my name? " * 20 + "\n"
    flags = ("--chat", "--max-new-tokens", 560, *flags)
    result = script(*flags, input=typed, terminal=True)
    assert len(as_if_compiled) == 2
    before, _, after = result.stderr.partition("compiled the step beyond")
    assert before.count("prefill") == after.count("prefill") == 1


def test_where_compiling_pays_nothing_is_said(script, as_if_compiled, monkeypatch):
    from parts import compiled

    flags = ("Once upon a time", "--max-new-tokens", 5, "--compile", "--show", "none")
    for plain, said in ((1000.0, 0), (0.0, 1)):  # seconds of a step that is not compiled
        monkeypatch.setattr(compiled, "prepare", lambda *_, plain=plain: (0.5, plain))
        result = script(*flags)
        assert result.returncode == 0 and result.stderr.count("[compiling took") == said
        many = script("--prompts", "-", *flags[1:], input="Once\nLlamas\nOne day\n")
        assert many.returncode == 0 and many.stderr.count("[compiling took") == said


# ------------------------------------------------------------------------------------ no silent no-ops


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--top-k", 5], "--top-k does nothing at temperature 0, the default; --temperature 0.8 draws"),
        (["--seed", 1, "--top-p", 0.9, "--top-k", 3], "--top-k, --top-p and --seed do nothing at temp"),
        (["--seed", 0], "--seed does nothing"),
        (["--seed", 1, "--temperature", 0.5], None),
        (["--top-k", 0, "--top-p", 1], None),
    ],
)  # fmt: skip
def test_sampling_flags_without_a_temperature(script, flags, says):
    result = script("Hi", *flags, "--max-new-tokens", 0, "--show", "none")
    assert result.returncode == 0
    first = result.stderr.splitlines()[0]
    assert first.startswith(says or "weights/tiny: ") or (not says and "weights/tiny: " in first)


def test_a_model_that_ends_at_once_says_so(script):
    result = script("What do llamas eat?", "--show", "none")
    assert result.stdout == "\n"
    assert "[the model ended at once; for a question try --chat]" in result.stderr.splitlines()
    result = script("What do llamas eat?", "--chat", "--show", "none")
    assert "ended at once" not in result.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["x", "--temprature", "1"], "--temperature"),
        (["x", "--colour", "never"], "--color"),
        (["x", "--max", "3"], "--max-new-tokens"),
        (["x", "--weight=tiny"], "--weights"),
        (["x", "--topk", "3"], "--top-k"),
        (["--promts", "f"], "--prompts"),
    ],
)
def test_a_typo_names_the_nearest_flag(script, arguments, says):
    result = script(*arguments)
    assert result.returncode == 2 and result.stderr.endswith(f"(is {says} meant?)\n")
    assert script("x", "--qqqq").stderr.endswith("(--help shows what there is)\n")


def test_ranges_are_plain_numbers(script):
    for flag, value, words in (
        ("--top-p", 1.5, "must be from 0 to 1 ("),
        ("--layers", 0, "must be 1 or more ("),
        ("--top-k", -1, "must be from 0 to 1,000,000,000 ("),
        ("--seed", -1, "must be from 0 to 9,223,372,036,854,775,807 ("),
    ):
        assert f"{flag} {value}: {words}" in script("x", flag, value).stderr
    assert span(1e-3, 1e3) == "from 0.001 to 1,000" and span(2, 10**6) == "from 2 to 1,000,000"


def test_errors_of_the_system_have_our_words(script, tmp_path):
    (tmp_path / "secret.txt").write_text("a")
    long = tmp_path / ("x" * 300)
    (tmp_path / "loop").symlink_to("loop")
    for path, says in (
        (tmp_path / "nowhere.txt", "no such file or folder"),
        (tmp_path, "expected a text file, a pipe or -, found a folder"),
        (tmp_path / "secret.txt" / "x", "a file, where a folder is expected"),
        (long, "the name is too long"),
        (tmp_path / "loop", "links that lead in a circle"),
    ):
        assert script("--prompts", path).stderr == f"error: {path}: {says}\n"


def test_prompts_skip_empty_lines_and_stream(script, terminal, at_once, monkeypatch):
    sample = (ROOT / "docs" / "prompts.txt").read_text()
    given = "\n" + sample.replace("\n", "\n\n", 1)
    flags = ("--max-new-tokens", 12)
    result = script("--prompts", "-", *flags, input=given)
    assert result.returncode == 0
    assert result.stderr.splitlines()[0] == "--prompts: 2 empty lines skipped (lines 1, 3)"
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    lines = given.split("\n")
    assert sorted(lines[answer["index"]] for answer in answers) == sorted(sample.splitlines())
    assert all(lines[answer["index"]] == answer["prompt"] for answer in answers)
    lengths = [len(answer["tokens"]) for answer in answers]
    assert lengths == sorted(lengths) and len({*lengths}) > 1  # as they finish
    total = rf"{len(answers)} prompts, {sum(lengths)} new tokens in [\d.]+ s, [\d.,]+/s"
    assert re.fullmatch(total, result.stderr.splitlines()[-1])

    monkeypatch.setattr(llama, "prefill", a_while(llama.prefill))
    _, screen = terminal("--prompts", ROOT / "docs/prompts.txt", *flags, columns=600)
    shown = [json.loads(row) for row in screen.lines() if row.startswith("{")]
    assert len(shown) == len(answers)  # each on a row of its own
    assert re.search(rf"\ranswering: +\d+%\|.*\| \d/{len(answers)} \[", screen.raw)
    assert not any("answering" in row for row in screen.lines())


# ------------------------------------------------------------------------------------ a real terminal


@pytest.mark.parametrize("columns", [80, 120])
def test_a_real_terminal(columns):
    """In a process of its own, as a newcomer runs it: the same screen, and Ctrl-C leaves it clean."""
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    child = pexpect.spawn(
        sys.executable if columns == 80 else quick_python(),
        [SCRIPT, "Once upon a time", "--max-new-tokens", "9"],
        cwd=str(ROOT),
        env=env | {"TERM": "xterm"},
        dimensions=(60, columns),
        encoding="utf-8",
        timeout=120,
    )
    screen = pyte.Screen(columns, 60)
    child.expect(pexpect.EOF)
    pyte.Stream(screen).feed(child.before)
    child.close()
    rows = [row.rstrip() for row in screen.display if row.strip()]
    assert child.exitstatus == 0
    assert rows[0] == "weights/tiny: dim 256, 4 layers, 3.5 M parameters, 7 MB of bfloat16"
    assert "tok_embeddings                B T D    1 5 256   bfloat16" in rows
    assert 'layers.0.attention_norm       B T D    "         "' in rows
    assert any(row.startswith("Once upon a time, there was a") for row in rows)
    assert rows[-1].startswith("prefill 5 tokens, ") and rows[-1].endswith(" GB")
    dims = next(n for n, row in enumerate(screen.display) if row.startswith("tok_embeddings"))
    assert screen.buffer[dims][34].fg == screen.buffer[dims][43].fg == "cyan"  # D and 256


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_fits(terminal, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        commandline.parse_arguments(["--help"])
    lines = capsys.readouterr().out.splitlines()
    long = [line for line in lines if len(line) > columns]
    assert all("torchrun" in line for line in long)  # a command, which is not to be cut
    assert "  --color {auto,always,never}" in lines
