"""Files that are whole or not there: one lock for a target, a name of its own for each copy in progress."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from parts import printable, reason
from parts.programs import NO_ROOM

UNFINISHED: set[Path] = set()  # what a process that ends at once (os._exit) has to take along


def local_path(given: str | Path) -> Path:
    """A path that a user gave, with ~ for a home. ValueError, in one line, for one that leads nowhere."""
    try:
        path = Path(given).expanduser()
        os.stat(path)
    except FileNotFoundError:
        if re.match(r"\w{2,}:/(?!/)", str(given)):
            raise ValueError(
                f"{given}: is a bucket meant? It has two slashes, as in gs://…"
            ) from None
    except OSError as problem:  # a loop of links, a name that is too long, a folder that is none
        raise ValueError(f"{given}: {reason(problem)}") from None
    except (RuntimeError, ValueError) as problem:  # ~nobody, a NUL
        raise ValueError(f"{given}: not a path ({problem})") from None
    return path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without the mark that some editors put before it."""
    return path.read_text(encoding="utf-8-sig")


@contextlib.contextmanager
def openable(path: Path) -> Iterator[Path]:
    """A name of a file during a with block, for libraries that want names to be UTF-8: a link."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            try:
                yield link
            except ValueError as problem:
                raise ValueError(str(problem).replace(str(link), str(path))) from None
    else:
        yield path


def read_input(given: str | Path) -> bytes:
    """All bytes of a file, or of a pipe such as a shell's <(…); ValueError for a device or a folder."""
    path = local_path(given)
    if not path.exists():
        raise ValueError(f"{given}: no such file or folder")
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device"
        raise ValueError(f"{given}: expected a text file, a pipe or -, found {kind}")
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ValueError(f"{given}: cannot be read ({reason(problem)})") from None


def check_target(target: Path) -> None:
    """ValueError if a file cannot be written there: what stands there is a folder, a pipe or a device."""
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a pipe, a socket or a device"
        raise ValueError(f"{target}: expected the name of a file to write, found {kind}")


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """An empty new file beside target; it takes target's place when the with block has ended well.

    If the block ends otherwise, that file is deleted, and target is as it was. A link stays one.
    """
    if target.is_symlink():
        target = target.resolve()
    check_target(target)
    part = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.part")
    part.open("xb").close()  # "x": nobody else's
    UNFINISHED.add(part)
    mode = part.stat().st_mode  # some writers leave a file that only its owner can read
    try:
        yield part
        part.chmod(mode)
        part.replace(target)
    except OSError as problem:
        if problem.errno in NO_ROOM:  # which file was it? A write does not say
            problem.filename = problem.filename or str(target)
        raise
    finally:
        part.unlink(missing_ok=True)
        UNFINISHED.discard(part)


@contextlib.contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """An empty new folder beside target, where nothing is; it gets that name when the block has ended well.

    If the block ends otherwise, it is deleted with all that is in it.
    """
    part = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.part")
    part.mkdir()
    UNFINISHED.add(part)
    try:
        yield part
        part.rename(target)
    except OSError as problem:
        if problem.errno in NO_ROOM:
            problem.filename = problem.filename or str(target)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        UNFINISHED.discard(part)


def delete_unfinished() -> None:
    """Deletes what is being written, for a process that ends without leaving its with blocks."""
    for part in list(UNFINISHED):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[bool]:
    """Holds the lock file `path` during a with block; says `waiting` if somebody else has it first.

    Yields whether it holds it: some network folders have no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    held = True
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(printable(waiting), file=sys.stderr)
            lock.acquire()
    except NotImplementedError:
        held = False
    try:
        yield held
    finally:
        lock.release()


def hash_of(path: Path, kind: str) -> str:
    """The checksum of a file's content; kind: sha256, md5, …, or git, which is what git calls it."""
    with open(path, "rb") as file:
        digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
        if kind == "git":
            digest.update(b"blob %d\0" % path.stat().st_size)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_marks(path: Path) -> dict[str, Any]:
    """What write_marks wrote; nothing, if that is not there or makes no sense."""
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_marks(path: Path, marks: dict[str, Any]) -> None:
    """Keeps what is known of files, as JSON."""
    with written_whole(path) as part:
        part.write_text(json.dumps(marks, indent=1), encoding="utf-8")


def state(path: Path) -> list[int] | None:
    """What changes when somebody writes to a file: its size and time. None: no such file."""
    if not path.is_file():
        return None
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]
