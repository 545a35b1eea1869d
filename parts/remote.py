"""Checkpoints in a bucket (gs://…, az://…): what is needed of one is copied into a cache folder, once."""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blobfile

from parts import first_line, printable, processes
from parts.files import hash_of, local_path, locked, read_marks, state, write_marks, written_whole
from parts.progress import progress, set_aside
from parts.table import size

CHECKPOINT_FILE = re.compile(
    r"(.*/)?(consolidated\.\d+\.pth|params\.json|tokenizer\.model|tokenizer\.json|config\.json"
    r"|(tokenizer_config|special_tokens_map|added_tokens|generation_config)\.json|chat_template\.jinja"
    r"|model.*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?"
    r"|meta_model_\d+\.pt|adapter_config\.json|llama3.*\.pth)"
)


def remote_files(url: str) -> dict[str, Any]:
    """What a checkpoint needs of a remote folder: blobfile's stat of each file, by its path in the folder."""
    names = sorted(name.rstrip("/") for name in blobfile.listdir(url))
    if "original" in names:
        names += [f"original/{name}" for name in sorted(blobfile.listdir(f"{url}/original"))]
    wanted = [name for name in names if CHECKPOINT_FILE.fullmatch(name)]
    if any(
        name.startswith("original/consolidated") for name in wanted
    ):  # one of the two layouts is enough
        wanted = [name for name in wanted if name.startswith("original/")]
    if not wanted:
        raise ValueError(f"no checkpoint there, it holds {', '.join(names[:5]) or 'nothing'}")
    return {name: blobfile.stat(f"{url}/{name}") for name in wanted}


def copy_file(
    url: str, target: Path, stat: Any, advance: Callable[[float], None] = lambda copied: None
) -> dict[str, Any]:
    """Copies one file; it is there when it is whole, and what the store says that it is (stat).

    Returns what `is_whole` wants to know of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)  # what stores know of a file, if they know anything
    with written_whole(target) as part:
        with blobfile.BlobFile(url, "rb", streaming=True) as source, open(part, "wb") as copy:
            while block := source.read(2**22):
                copy.write(block)
                digest.update(block)
                advance(len(block))
                if copy.tell() > stat.size:
                    break
            copy.flush()
            os.fsync(copy.fileno())  # whole also after the power has gone
        if part.stat().st_size != stat.size:
            raise ValueError(f"{part.stat().st_size} bytes came, {stat.size} were announced")
        if stat.md5 not in (None, digest.hexdigest()):
            raise ValueError(f"damaged on the way: md5 {digest.hexdigest()}, not {stat.md5}")
        if announced(blobfile.stat(url)) != announced(stat):
            raise ValueError("it was changed while it was copied")
    return {"store": announced(stat), "md5": digest.hexdigest(), "local": state(target)}


def announced(stat: Any) -> list[Any]:
    """What a store says of a file: size, time, md5, and the number of its version, as far as it has them."""
    return [stat.size, stat.mtime, stat.md5, stat.version]


def is_whole(target: Path, stat: Any, mark: dict[str, Any]) -> bool:
    """Is a file that was copied before still what the store has? mark: what was noted of it then.

    Hashing gigabytes at each start would be slow. So it is hashed when somebody has written to it since, or
    when an older version of this program, which noted no checksum, has copied it.
    """
    local = state(target)
    if local is None or local[0] != stat.size:
        return False
    known = mark.get("md5") if mark.get("store") == announced(stat) else stat.md5
    if mark.get("store") == announced(stat) and mark.get("local") == local:
        return True
    return known is not None and hash_of(target, "md5") == known


def copy_missing(url: str, folder: Path, alone: bool) -> None:
    """Copies what a folder lacks of a remote one, and deletes what is gone there. alone: nobody else does."""
    where = url
    try:
        stats = remote_files(url)
        for old in [*folder.rglob("*.copied"), *folder.rglob("*.copied.json")]:
            name = re.sub(r"\.copied(\.json)?$", "", old.relative_to(folder).as_posix())
            if name not in stats:
                (folder / name).unlink(missing_ok=True)
                old.unlink()
        for left in folder.rglob(
            ".*.part"
        ):  # of a run that was killed; who holds the lock is alone
            if alone:
                left.unlink(missing_ok=True)
        total = sum(stat.size for stat in stats.values())
        came = 0
        with progress(f"copying {url}", total, "B") as advance:
            for name, stat in stats.items():
                target, marks = folder / name, folder / f"{name}.copied.json"
                where = f"{url}/{name}"
                mark = read_marks(marks)
                if is_whole(target, stat, mark):
                    mark |= {"store": announced(stat), "local": state(target)}
                    mark["md5"] = mark.get("md5") or stat.md5
                    advance(stat.size)
                else:
                    mark = copy_file(where, target, stat, advance)
                    came += stat.size
                if read_marks(marks) != mark:
                    write_marks(marks, mark)
                (folder / f"{name}.copied").unlink(missing_ok=True)  # an older version's
        if came:
            with set_aside():
                print(f"{printable(url, 200)}: {size(came)} copied to {folder}", file=sys.stderr)
    except Exception as problem:  # each cloud has its own
        raise ValueError(
            f"{where}: not copied ({first_line(problem)}); what is whole is kept"
        ) from None


def cached_copy(url: str, cache_dir: str | None = None) -> Path:
    """Copies what a checkpoint needs from a remote folder into a cache folder, once; returns that folder.

    url: what blobfile reads (gs://…, az://…, https://….blob.core.windows.net/…), a folder or a file in it. An
    interrupted copy goes on with the files that are missing. A file that has changed there (size, time, md5,
    version) or here (see is_whole) is copied again, one that is gone is deleted. Of several runs at once one
    copies, the others wait.
    """
    file, url = "", url.rstrip("/")
    if CHECKPOINT_FILE.fullmatch(url.rsplit("/", 1)[-1]):
        url, file = url.rsplit("/", 1)
    root = Path(
        cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "llama3_from_scratch"
    )
    key = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    folder = local_path(root) / f"{url.rsplit('/', 1)[-1][:100]}-{key}"
    blobfile.configure(
        retry_limit=3, log_callback=lambda message: None
    )  # else it retries for ever, and aloud
    if folder.parent.exists() and not folder.parent.is_dir():
        raise ValueError(f"--cache-dir {folder.parent}: not a folder")
    waiting = f"{url}: another run copies it to {folder}; this one waits"
    with locked(folder.with_name(f"{folder.name}.lock"), waiting) as alone:
        copy_missing(url, folder, alone)
    return folder / file


def local_copy(path: str | Path, cache_dir: str | None) -> Path:
    """A path on this machine; of a remote folder, a copy of it."""
    if "://" not in str(path):
        return local_path(path)
    try:
        if processes()[1] == 1:
            return cached_copy(str(path), cache_dir)
        from parts import parallel

        return parallel.one_after_the_other(lambda: cached_copy(str(path), cache_dir))
    except OSError as problem:
        raise ValueError(f"{path}: no room for a copy of it ({first_line(problem)})") from None
