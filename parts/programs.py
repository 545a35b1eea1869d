"""How every program here begins and ends: flags, signals, the last flush, errors in one line."""

import argparse
import bdb
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from parts import first_line, printable

# What a print raises. An error of a file of ours has a file's name (written_whole sees to it).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def flags_of(**options: Any) -> argparse.ArgumentParser:
    """An ArgumentParser that raises ValueError, in one line, for a wrong flag."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter} | options
    parser = argparse.ArgumentParser(allow_abbrev=False, **options)

    def wrong(message: str) -> NoReturn:
        hint = "--help shows what there is"
        unknown = re.match(r"unrecognized arguments: .*?(--?\w[\w-]*)", message)
        if unknown and (near := nearest(unknown[1], parser._option_string_actions)):
            hint = f"is {near} meant?"
        raise ValueError(f"{message} ({hint})")

    def show_help(file: Any = None) -> None:
        print(parser.format_help(), end="", file=file, flush=True)  # argparse's hides a full disk

    parser.error = wrong  # type: ignore
    parser.print_help = show_help  # type: ignore
    return parser


def nearest(typed: str, words: Iterable[str]) -> str | None:
    """The word that somebody meant who typed another one: one that it begins, or that is nearly it."""
    known = sorted(words)
    begun = [word for word in known if len(typed) > 2 and word.startswith(typed)]
    return next(iter(begun or difflib.get_close_matches(typed, known, 1)), None)


def say_error(problem: object) -> None:
    """An error as one line on stderr, safe for a terminal and of bounded length."""
    with contextlib.suppress(OSError, ValueError):  # nobody there to hear it
        print(f"error: {printable(str(problem))}", file=sys.stderr, flush=True)


def flushed(stream: Any) -> OSError | None:
    """Empties a stream's buffer. If that fails: the error, and the stream leads nowhere from here on.

    Python would try again as it ends, and say so in its own words.
    """
    try:
        stream.flush()
    except OSError as problem:
        with contextlib.suppress(OSError, ValueError):  # a test's or a notebook's has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return problem
    except ValueError:  # it is closed
        pass
    return None


def told_to_end(number: int, frame: object) -> NoReturn:
    """SIGTERM or SIGHUP: ends like an exception, so that nothing half-written is left."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def end_at_once(process: Any) -> None:
    """Ends a process that was started in a session of its own, with all that it has started: compilers."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows
        process.kill()
    process.wait()


@contextlib.contextmanager
def signals() -> Any:
    """During a with block Ctrl-C raises KeyboardInterrupt, SIGTERM and SIGHUP raise SystemExit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # else: nohup
            before[number] = signal.signal(number, told_to_end)
    try:
        yield
    finally:
        for number, handler in before.items():  # as they were, for a notebook
            if handler is not None:
                signal.signal(number, handler)


def write_utf8() -> None:
    """To a file or a pipe UTF-8 is written, whatever the locale says; a terminal shows what it can."""
    for stream in (sys.stdout, sys.stderr):
        if not hasattr(stream, "reconfigure"):  # a notebook's
            continue
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def as_utf8(text: str | None) -> str | None:
    """An argument as the UTF-8 that its bytes are, though the locale says something else."""
    try:
        return text and os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def run_program(work: Callable[[], int | None], stopped: str = "") -> int:
    """Runs a program's work and returns its exit code; however it ends, it says one line at most.

    2: a mistake of the user's, or an output that cannot be written. 130: Ctrl-C; stopped: what to say then.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))
    write_utf8()
    code = 0
    try:
        with signals():
            code = ended(work, stopped)
            problem = flushed(sys.stdout)
            if isinstance(problem, BrokenPipeError):  # whoever read the text has gone
                problem = None
            if problem is not None:
                say_error(f"standard output cannot be written ({problem.strerror})")
                code = 2
            flushed(sys.stderr)
    except KeyboardInterrupt:  # in the very last moment
        return 130
    return code


def behind(problem: BaseException | None) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit that an error came of, if one did: in torch.save, for one.

    Not where a program says the error itself (`raise … from`): of somebody's sys.exit() in a cell.
    """
    while problem is not None and not isinstance(problem, (KeyboardInterrupt, SystemExit)):
        problem = problem.__context__ if problem.__cause__ is None else None
    return problem


def ended(work: Callable[[], int | None], stopped: str) -> int:
    """The exit code of work(), whatever it raises; only a mistake of ours is raised on."""
    try:
        try:
            return work() or 0
        except Exception as problem:
            stop = behind(problem)
            if stop is None:
                raise
            raise stop from None
    except KeyboardInterrupt:
        if stopped:
            with contextlib.suppress(OSError):
                print(f"\n{stopped}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help, and told_to_end
        if isinstance(stop.code, str):
            say_error(stop.code)
            return 2
        return stop.code or 0
    except bdb.BdbQuit:  # the debugger's "quit"
        return 0
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "memory" not in str(problem):
            raise  # a mistake of ours
        line = str(problem) or "out of memory"
        if not isinstance(problem, ValueError):
            line = first_line(problem)  # PyTorch's go on for long
        if isinstance(problem, OSError) and problem.filename is None and problem.errno in NO_ROOM:
            line = f"standard output cannot be written ({problem.strerror})"
            flushed(sys.stdout)
        say_error(line)
    return 2
