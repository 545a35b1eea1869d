"""Prompts typed at a terminal, one after another; with --chat a conversation, which goes on in its cache.

Lines are edited where Python has readline and both ends are a terminal. Ctrl-C stops an answer: what was
written of it stays a part of the conversation; a question that was still being read is taken back.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiktoken

import llama3_from_scratch as llama
from parts import printable, processes, reason
from parts.chat import Messages, prompt_ids
from parts.files import local_path, written_whole
from parts.programs import nearest, say_error

Read = Callable[[str], str | None]  # asks with some words: what was typed, None at the end
COMMANDS = {
    "/help": "what there is",
    "/reset": "the conversation begins anew",
    "/system TEXT": "what the assistant is told first; the conversation begins anew",
    "/save FILE": "keeps the conversation, in Markdown (FILE.md) or JSON (FILE.json)",
    "/exit": "ends, as Ctrl-D does",
}
NAMES = [command.split()[0] for command in COMMANDS]
KEYS = """\
a closing backslash: the text goes on in the next line; a space before a slash: it is for the model
Ctrl-C: stops the answer, a second one ends; arrows: what was typed before"""
PROGRAM = "llama3_from_scratch.py"  # stands in what /save writes
COMMENT = f"<!-- a conversation kept by {PROGRAM} -->"


# ------------------------------------------------------------------------------------ what is typed


def plain_line() -> str | None:
    """A line from a terminal. Ctrl-D in the middle of one ends it, as Enter would; None: at its start.

    It is read past Python's buffer, which would wait for the end of the line, and keep what is meant for
    the debugger. Bytes that are no text stay in the line, for the check of the prompt to find.
    """
    terminal = getattr(sys.stdin.buffer, "raw", None)  # a terminal gives at most one line at a time
    block = terminal.read(2**16) if terminal else sys.stdin.buffer.readline()
    if not block:
        return None
    if not block.endswith(b"\n"):
        print(file=sys.stderr)
    return block.decode(sys.stdin.encoding or "utf-8", "surrogateescape").rstrip("\r\n")


def edited_line(words: str) -> str | None:
    """A line from a terminal, by readline, which reads past Python's buffer too."""
    try:
        return input(words).rstrip("\r\n")
    except EOFError:
        return None


def line_editor() -> Any:
    """Python's readline, told what is needed here; None if there is none, or no terminal to edit at."""
    try:
        at_terminal = sys.stdin.fileno() == 0 and sys.stdout.fileno() == 1
    except (OSError, ValueError):  # a test's or a notebook's
        return None
    if not (at_terminal and sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        readline: Any = importlib.import_module("readline")  # Windows has none
    except ImportError:
        return None
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore  # as plain_line
    if "libedit" not in (readline.__doc__ or ""):
        settings: tuple[str, ...] = (
            "input-meta on",
            "output-meta on",
            "convert-meta off",
        )  # letters of all kinds
        if os.environ.get("TERM") != "dumb":
            settings = (*settings, "enable-bracketed-paste on")
        for setting in settings:
            readline.parse_and_bind(f"set {setting}")
        readline.parse_and_bind(r'"\C-d": accept-line')  # at the start of a line it still ends
    return readline


def complete_commands(readline: Any) -> None:
    """The Tab key completes a /command."""

    def completed(text: str, n: int) -> str | None:
        found = [f"{name} " for name in NAMES if text.startswith("/") and name.startswith(text)]
        return found[n] if n < len(found) else None

    readline.set_completer(completed)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")


@contextlib.contextmanager
def no_echo(wanted: bool) -> Iterator[None]:
    """What is typed during a with block is not shown in the middle of an answer, but at the next "> "."""
    if not wanted:
        yield
        return
    termios: Any = importlib.import_module("termios")  # where there is readline, there is this
    before = termios.tcgetattr(0)
    flags = [*before]
    flags[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSADRAIN, flags)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def line_reader(readline: Any) -> Read:
    """A function that asks for a line with some words; with several processes at that of the first."""
    if readline is not None and processes()[1] == 1:
        return edited_line
    lines: Iterator[str | None] = iter(plain_line, None)
    if processes()[1] > 1:
        from parts import parallel

        lines = parallel.lines_of_process_0(lines)

    def read(words: str) -> str | None:
        print(words, end="", file=sys.stderr, flush=True)
        return next(lines, None)

    return read


def typed_text(read: Read) -> str | None:
    """What is typed until a line ends without a backslash, without these; None at the end."""
    text = read("> ")
    while text is not None and re.search(r"(?<!\\)(\\\\)*\\$", text):
        more = read("| ")
        text = text[:-1] + ("" if more is None else f"\n{more}")
    return text


def typed_prompts(read: Read, readline: Any, presses: list[int]) -> Iterator[str]:
    """One text after another, until Ctrl-D or the second Ctrl-C (KeyboardInterrupt) in a row.

    presses: one for each Ctrl-C since something was typed.
    """
    while True:
        try:
            text = typed_text(read)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if readline is not None and readline.get_line_buffer():  # what was typed is dropped
                presses.clear()
                continue
            presses.append(signal.SIGINT)
            if len(presses) > 1:
                raise
            print("[Ctrl-C once more ends, and so does Ctrl-D]", file=sys.stderr)
            continue
        presses.clear()
        if text is None:
            print(file=sys.stderr)
            return
        if text.strip():
            yield text


# ------------------------------------------------------------------------------------ commands


def check_utf8(name: str, text: str) -> None:
    """ValueError for a text with bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: the text is not valid UTF-8") from None


def obey(line: str, talk: dict[str, Any], args: argparse.Namespace, read: Read) -> bool:
    """Does what a /command says. Returns whether the conversation goes on. ValueError for a mistake."""
    name = line.split()[0]
    rest = line[len(name) :].strip()
    if name not in NAMES:
        near = nearest(name.lower(), NAMES)
        advice = f"is it {near}?" if near else "/help shows what there is."
        raise ValueError(f"{name}: no such command; {advice} A space before it sends it as text")
    if rest and name not in ("/system", "/save"):
        raise ValueError(f"{name} stands alone; found {rest!r} behind it")
    if name == "/exit":
        return False
    if name == "/help":
        for command, words in COMMANDS.items():
            print(f"{command:<14}{words}", file=sys.stderr)
        print(KEYS, file=sys.stderr)
    if name == "/system" and not rest:
        told = "nothing" if args.system is None else args.system
        print(f"[the assistant is told first: {printable(told)}]", file=sys.stderr)
    elif name == "/system":
        check_utf8(name, rest)
        args.system = rest
    if name == "/reset" or name == "/system" and rest:
        talk["said"], talk["messages"] = [], []
        print("[the conversation begins anew]", file=sys.stderr)
    if name == "/save":
        save(rest, talk, args, read)
    return True


def as_text(messages: Messages, weights: str, kind: str) -> str:
    """A conversation as a file's content; kind: ".json" or ".md"."""
    if kind == ".json":
        kept = {"program": PROGRAM, "weights": weights, "messages": [*messages]}
        return json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
    names = {"system": "System", "user": "You", "assistant": "Assistant"}
    texts = [f"## {names[message['role']]}\n\n{message['content']}\n" for message in messages]
    return "\n".join([f"{COMMENT}\n# A conversation with {weights}\n", *texts])


def is_conversation(path: Path) -> bool:
    """Is this a file that /save wrote?"""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        text = path.read_text(encoding="utf-8-sig")
        return text.startswith(COMMENT) or json.loads(text).get("program") == PROGRAM
    return False


def save(given: str, talk: dict[str, Any], args: argparse.Namespace, read: Read) -> None:
    """Keeps a conversation in a file, whole; what is no conversation is written over if one says so."""
    quoted = re.fullmatch(r"(['\"])(.+)\1", given)
    path = local_path(quoted[2] if quoted else given)
    if path.suffix.lower() not in (".json", ".md"):
        raise ValueError(f"/save {given}: a name that ends in .md or .json is expected")
    if not talk["messages"]:
        raise ValueError("/save: nothing has been said yet")
    messages, weights = [*talk["messages"]], printable(args.weights)
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    rank, N = processes()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; /save takes another name")
    if rank == 0 and path.exists() and not is_conversation(path):
        if N > 1:  # the others do not see the file, and would not know of the question
            raise ValueError(f"{path}: there is something else; /save takes another name")
        words = f"{printable(path)} is no conversation of this program; write over it? [y/N] "
        try:
            said = read(words)
        except KeyboardInterrupt:  # a way to say no
            print(file=sys.stderr)
            said = None
        if (said or "").strip().lower() not in ("y", "yes"):
            print("[nothing was written]", file=sys.stderr)
            return
    if rank == 0:
        try:
            with written_whole(path) as part:
                part.write_text(as_text(messages, weights, path.suffix.lower()), encoding="utf-8")
        except OSError as problem:
            raise ValueError(f"{path}: cannot be written ({reason(problem)})") from None
    print(f"[{printable(path)}: {len(messages)} messages]", file=sys.stderr)


# ------------------------------------------------------------------------------------ turns


def turn_ids(
    prompt: str,
    said: list[int],
    tokenizer: tiktoken.Encoding,
    args: argparse.Namespace,
    context: float,
    history: Messages = (),
) -> list[int]:
    """prompt_ids behind all that was said; an answer that was cut short is closed first."""
    template = getattr(tokenizer, "template", None)  # which closes it itself
    if said and template is None and said[-1] not in llama.stop_ids(tokenizer):
        said = [*said, llama.special(tokenizer, "eot_id")]
    return prompt_ids(prompt, tokenizer, context, args.chat, args.system, said, history)


def alike(a: list[int], b: list[int]) -> int:
    """How many ids are the same at the start of both?"""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))
    return sum(1 for _ in pairs)


def stoppable(
    answer: Callable[..., list[int]], go_on: Callable[..., Iterator], presses: list[int]
) -> Callable[..., list[int]]:
    """answer, which Ctrl-C ends after a token, with all that it has written. presses: see typed_prompts.

    KeyboardInterrupt while the prompt is read, and for a second Ctrl-C.
    """

    def stopped(ids: list[int], cache: llama.Cache, cached: int) -> list[int]:
        writing: list[bool] = []

        def steps(*given: Any) -> Iterator:
            writing.append(True)
            for tokens in go_on(*given):
                yield tokens
                if presses:
                    return

        def press(number: int, frame: object) -> None:
            presses.append(number)
            if not writing or len(presses) > 1:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, press)
        try:
            return answer(ids, cache, cached, go_on=steps)
        finally:
            signal.signal(signal.SIGINT, before)

    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        return answer  # several processes end together (parts/parallel.py)
    return stopped


def converse(
    model: llama.Model,
    args: argparse.Namespace,
    answer: Callable[..., list[int]],
    go_on: Callable[..., Iterator],
) -> None:
    """Answers what is typed until the terminal closes. answer and go_on: as in parts/commandline.py."""
    weights, params, tokenizer = model
    if args.save_trace is not None:
        raise ValueError("--save-trace needs a prompt on the command line")
    cache = llama.make_cache(weights, params, 1)
    context, stops = params["max_seq_len"], llama.stop_ids(tokenizer)
    # What was said: as ids, whose last may not be in the cache, and as messages.
    talk: dict[str, Any] = {"said": [], "messages": []}
    held: list[int] = []  # of which the cache holds keys and values
    presses: list[int] = []
    answer = stoppable(answer, go_on, presses)
    readline = line_editor()
    if readline is not None and args.chat:
        complete_commands(readline)
    read = line_reader(readline)
    words = "type a prompt, then Enter; Ctrl-D ends"
    if args.chat:
        words = "type a question, then Enter; /help shows more, Ctrl-D ends"
    print(words, file=sys.stderr)
    for prompt in typed_prompts(read, readline, presses):
        try:
            if args.chat and prompt.startswith("/"):
                if not obey(prompt, talk, args, read):
                    return
                continue
            if args.chat and prompt.startswith(" /"):
                prompt = prompt[1:]
            alone = turn_ids(prompt, [], tokenizer, args, context)
            ids = turn_ids(prompt, talk["said"], tokenizer, args, math.inf, talk["messages"])
        except ValueError as problem:  # it would be too long alone, or a template refuses it
            say_error(problem)
            continue
        if len(ids) > context:
            print("[the context is full: the conversation begins anew]", file=sys.stderr)
            ids, talk["messages"] = alone, []
        cached = min(alike(held, ids), len(ids) - 1)  # of the prompt one token must be read
        held = ids[:cached]  # what is behind is written over
        try:
            with no_echo(readline is not None and not args.break_at):
                new = answer(ids, cache, cached)
        except KeyboardInterrupt:
            if len(presses) > 1:
                raise
            print("\n[stopped; the question is taken back]", file=sys.stderr)
            continue
        held = (ids + new)[:-1]
        if not args.show_asked:
            args.show = "none"  # once is enough
        if args.chat:
            talk["said"] = ids + new
            text = tokenizer.decode(new[:-1] if new and new[-1] in stops else new)
            talk["messages"] += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": text},
            ]
