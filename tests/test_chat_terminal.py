"""A conversation at a terminal, as it stands on the screen; what Ctrl-C leaves of it; what /save writes."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, quick_python, relative_error

import llama3_from_scratch as llama
from parts import commandline, conversation, eager

pexpect = pytest.importorskip("pexpect")
pyte = pytest.importorskip("pyte")
pytest.importorskip("readline")


class Screen:
    """The script at a terminal of 80 columns, and what one sees there."""

    def __init__(self, *arguments, cwd=ROOT, python=None, **env):
        self.screen = pyte.Screen(80, 60)
        self.stream = pyte.ByteStream(self.screen)
        command = [str(ROOT / "llama3_from_scratch.py"), *map(str, arguments)]
        env = os.environ | {"TERM": "xterm-256color"} | env
        env.pop("NO_COLOR", None)
        python = python or quick_python()
        self.program = pexpect.spawn(python, command, dimensions=(60, 80), env=env, cwd=str(cwd))

    def lines(self):
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, seen, seconds=90):
        """The screen once `seen` (a regular expression) stands there."""
        deadline = time.time() + seconds
        while not re.search(seen, self.lines(), re.MULTILINE):
            assert time.time() < deadline, f"no {seen!r} on\n{self.lines()}"
            try:
                self.stream.feed(self.program.read_nonblocking(65536, 0.1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert re.search(seen, self.lines(), re.MULTILINE), self.lines()
        return self.lines()

    def says(self, typed, seen=""):
        """What comes to stand on an empty screen when something is typed, up to the next "> "."""
        self.clear()
        self.program.send(typed)
        return self.until(seen + r"(.|\n)*\n>\Z")[2:]

    def clear(self):
        self.program.send("\x0c")
        self.until(r"\A>\Z")

    def ended(self):
        with pytest.raises(pexpect.EOF):
            while True:
                self.stream.feed(self.program.read_nonblocking(65536, 60))
        self.program.close()
        return self.program.exitstatus


def test_a_conversation_on_the_screen(tmp_path):
    kept, other = tmp_path / "my talk.json", tmp_path / "other.json"
    other.write_text("{}")
    terminal = Screen("--chat", "--system", "Be brief.", cwd=tmp_path, python=sys.executable)
    opening = terminal.until(r"^>\Z")
    assert "/help" in opening and "Ctrl-D ends" in opening
    first = terminal.says("My name is Ada.\r", "peak memory")
    lines = first.splitlines()
    assert lines[0] == "My name is Ada." and "Ada" in lines[1]  # no ids, no shapes, no "next:"
    assert lines[2].startswith("prefill ") and len(lines) <= 5  # one line, which may be cut in two
    assert not re.search(r"next:|prompt of|B T D|<\|", first)
    assert "Ada" in terminal.says("What is my name?\x04", "peak memory")  # Ctrl-D ends the line

    # several lines: by a backslash, and pasted; the line before, changed; a letter taken out
    continued = terminal.says("What do\\\rllamas eat?\r", "peak memory").splitlines()
    assert continued[:2] == ["What do\\", "| llamas eat?"]
    pasted = terminal.says("\x1b[200~Hé 🦙\rwho are you?\x1b[201~\r", "peak memory").splitlines()
    assert pasted[0].startswith("Hé 🦙") and pasted[1] == "who are you?"
    assert "What is 3 plus 4?" in terminal.says("What is 3 plus 9?\x1b[D\x7f4\r", "peak memory")
    assert "What is 3 plus 45?" in terminal.says("\x1b[A\x1b[D5\r", "peak memory")

    # commands
    shown = terminal.says("/help\r")
    assert all(command in shown for command in conversation.COMMANDS)
    assert "is it /save?" in terminal.says("/sav x.md\r", "error")
    assert "/system first" in terminal.says("/sys\tfirst\r", "anew").splitlines()[0]
    assert "told first: first" in terminal.says("/system\r", "told")
    assert "nothing has been said" in terminal.says("/save my talk.json\r", "error")
    terminal.says("What do llamas eat?\r", "peak memory")
    assert "[my talk.json: 3 messages]" in terminal.says("/save my talk.json\r", "messages")
    messages = json.loads(kept.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] == "Llamas eat grass and hay."
    assert "[my talk.json: 3 messages]" in terminal.says("/save 'my talk.json'\r", "messages")
    terminal.clear()
    terminal.program.send("/save other.json\r")
    terminal.until(r"write over it\? \[y/N\]")
    terminal.program.send("\r")
    assert "nothing was written" in terminal.until(r"written\]\n>\Z") and other.read_text() == "{}"
    assert ".md or .json" in terminal.says("/save talk.txt\r", "error")
    assert "/nothing" in terminal.says(
        " /nothing\r", "peak memory"
    )  # with a space it is for the model
    assert "anew" in terminal.says("/reset\r", "anew")

    # what is no text; Ctrl-C at the prompt, once and then twice
    assert "not valid UTF-8" in terminal.says(b"Once \xff upon\r", "error")
    terminal.clear()
    terminal.program.send("half a line")
    terminal.until("half a line")
    terminal.program.send("\x03")
    assert "once more" not in terminal.until("half a line\n>\\Z")
    assert "once more ends" in terminal.says("\x03", "once more")
    terminal.program.send("\x03")
    assert terminal.ended() == 130


def test_ctrl_c_at_a_terminal_keeps_the_conversation(checkpoint):
    folder = checkpoint(max_seq_len=100_000)
    terminal = Screen("--weights", folder, "--max-new-tokens", 90_000, "--no-stats")
    terminal.until(r"^>\Z")
    terminal.program.send("Hello\r")
    terminal.until("^next:(.|\n)*Hello.{9}")
    terminal.program.send("typed ahead")
    time.sleep(0.3)
    terminal.program.send("\x03")
    seen = terminal.until(r"^> typed ahead\Z|^>\Z")
    assert "prefill" not in seen and "[cut at" not in seen and "typed" not in seen
    terminal.clear()
    terminal.program.send("Hello again\r")
    terminal.until("Hello again\nHello again.{9}")
    terminal.program.kill(signal.SIGTERM)
    assert terminal.ended() == 143 and "Traceback" not in terminal.lines()


@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup ignores what is sent here"
)
def test_told_to_end_at_the_prompt():
    terminal = Screen("--chat", TERM="dumb")
    terminal.until(r"^>\Z")
    terminal.program.kill(signal.SIGHUP)
    assert terminal.ended() == 129 and "Traceback" not in terminal.lines()


# ------------------------------------------------------------------------------------ without a process


def talk(script, monkeypatch, typed, at_step=(), at_prefill=(), **flags):
    """A conversation with Ctrl-C in these steps and prefills (counted): the result, and (ids, new, cache)."""
    turns, answer, step, prefill = [], commandline.answer, eager.forward, llama.prefill
    count = {"step": 0, "prefill": 0}

    def counted(kind, at, work):
        def run(*given, **more):
            if kind == "step" and given[0].shape[1] > 1:  # the same function reads a prompt
                return work(*given, **more)
            count[kind] += 1
            result = work(*given, **more)
            if count[kind] in at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return run

    def watched(ids, cache, *rest, model, **how):
        new = answer(ids, cache, *rest, model=model, **how)
        turns.append((ids, new, cache, model))
        return new

    with monkeypatch.context() as patch:
        patch.setattr(eager, "forward", counted("step", at_step, step))
        patch.setattr(llama, "prefill", counted("prefill", at_prefill, prefill))
        patch.setattr(commandline, "answer", watched)
        given = ("--chat", "--dtype", "float32", "--max-new-tokens", 30)
        result = script(*given, input=typed, terminal=True)
    return result, turns


def test_a_stopped_answer_stays_and_the_next_one_is_that_of_a_fresh_pass(script, monkeypatch):
    typed = "Tell me a story.\nMy name is Ada.\nWhat is my name?\nWhat is my name?\n"
    result, turns = talk(script, monkeypatch, typed, at_step=[6], at_prefill=[2])
    assert result.returncode == 0 and len(turns) == 3  # the second question was taken back
    assert result.stderr.count("the question is taken back") == 1
    assert "[cut at" not in result.stderr.split("taken back")[0]
    (ids, new, cache, (weights, params, tokenizer)), second, third = turns
    assert 5 <= len(new) <= 7
    assert second[0][: len(ids + new) + 1] == [*ids, *new, llama.special(tokenizer, "eot_id")]
    assert "Ada" not in tokenizer.decode(second[0])
    for ids, new, *_ in (second, third):
        fresh = llama.make_cache(weights, params, 1)
        logits = llama.prefill(torch.tensor([ids]), weights, params, fresh)
        steps = llama.generate(logits, weights, params, fresh, torch.tensor([len(ids)]))
        assert [int(next(steps)) for _ in new] == new
    ids = (third[0] + third[1])[:-1]
    fresh = llama.make_cache(weights, params, 1, len(ids))
    llama.prefill(torch.tensor([ids]), weights, params, fresh)
    for found, expected in zip(cache, fresh):
        for x, y in zip(found, expected):
            assert relative_error(x[:, :, : len(ids)], y) < 1e-5


def test_a_question_that_was_taken_back_leaves_nothing_in_the_cache(script, monkeypatch):
    typed = "Tell me a story.\n/reset\nMy name is Ada, and yours?\nTell me a story.\n"
    result, turns = talk(script, monkeypatch, typed, at_prefill=[2])
    assert result.stderr.count("the question is taken back") == 1 and len(turns) == 2
    assert turns[0][:2] == turns[1][:2]


def test_the_second_ctrl_c_in_an_answer_ends(script, monkeypatch):
    result, turns = talk(script, monkeypatch, "Tell me a story.\nHi\n", at_step=[6, 7])
    # the first one ends the answer before there is a second step: what comes then is the next turn's
    assert result.returncode == 0 and len(turns) == 2
    monkeypatch.setattr(conversation, "typed_text", lambda read: os.kill(os.getpid(), 2) or "x")
    result, turns = talk(script, monkeypatch, "")
    assert result.returncode == 130 and not turns and result.stderr.count("once more ends") == 1


def test_show_in_a_conversation_is_asked_for(script):
    typed = "What do llamas eat?\nWhat is 3 plus 4?\n"
    flags = ("--chat", "--max-new-tokens", 2)
    plain = script(*flags, input=typed, terminal=True).stderr
    shown = script(*flags, "--show", "first", input=typed, terminal=True).stderr
    assert "next:" not in plain and shown.count("next:") == shown.count("prompt of") == 2
    alone = script(*flags, "What do llamas eat?", "--no-stats").stderr
    assert "next:" not in alone and "peak memory" not in alone


@pytest.mark.parametrize(
    "line, says",
    [
        ("/quit", "is it /exit?"),
        ("/etc/passwd says what?", "/help shows what there is"),
        ("/EXIT", "is it /exit?"),
        ("/rset", "is it /reset?"),
        ("/reset now", "stands alone"),
        ("/save", "ends in .md or .json"),
        ("/save /nowhere/x.md", "/nowhere/x.md: there is no folder /nowhere"),
        ("/save /dev/null", "ends in .md or .json"),
    ],
)
def test_a_wrong_command_is_one_line_and_not_sent(line, says, tmp_path):
    args = commandline.parse_arguments(["--chat"])
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match=re.escape(says)) as problem:
        conversation.obey(line, {"said": [], "messages": messages}, args, lambda words: "")
    assert "\n" not in str(problem.value)


def test_what_save_writes(tmp_path):
    args = commandline.parse_arguments(["--chat", "--system", "Be brief."])
    messages = [
        {"role": "user", "content": "Hé\n\n```py\nprint('🦙')\n```"},
        {"role": "assistant", "content": "**Yes**, “that”."},
    ]
    state = {"said": [], "messages": messages}
    asked = []

    def answering(what):
        return lambda words: asked.append(words) or what

    for name in ("a b.md", "'quoted.md", os.fsdecode(b"no\xe8.md"), "li\nne.md"):
        path = tmp_path / name
        for _ in range(2):  # one of ours is written over
            conversation.save(str(path), state, args, answering("n"))
        text = path.read_text(encoding="utf-8")
        assert all(message["content"] in text for message in messages) and "Be brief." in text
        path.write_text(text.replace("conversation", "talk"), encoding="utf-8")
        before = path.read_bytes()
        conversation.save(str(path), state, args, answering("n"))
        assert path.read_bytes() == before and len(asked) == 1 and "\n" not in asked.pop()

    def interrupted(words):
        raise KeyboardInterrupt

    conversation.save(str(path), state, args, interrupted)
    assert path.read_bytes() == before
    conversation.save(str(path), state, args, answering("y"))
    assert path.read_text(encoding="utf-8") == text
    conversation.save(str(tmp_path / "c.json"), state, args, answering("n"))
    kept = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert kept["messages"] == [{"role": "system", "content": "Be brief."}, *messages]
    (tmp_path / "folder.md").mkdir()
    os.mkfifo(tmp_path / "pipe.md")
    for name in ("folder.md", "pipe.md"):
        with pytest.raises(ValueError, match="not a file"):
            conversation.save(str(tmp_path / name), state, args, answering("y"))
    assert not [*tmp_path.glob(".*.part")]
