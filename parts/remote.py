"""Checkpoints in a bucket (gs://…, az://…): what is needed of one is copied into a cache folder, once."""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blobfile

from parts import first_line, processes

CHECKPOINT_FILE = re.compile(
    r"(.*/)?(consolidated\.\d+\.pth|params\.json|tokenizer\.model|tokenizer\.json|config\.json"
    r"|model.*\.safetensors(\.index\.json)?|llama3.*\.pth)"
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


def copy_file(url: str, target: Path, size: int, progress: Callable[[int], None]) -> None:
    """Copies one file next to its target and renames it when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with blobfile.BlobFile(url, "rb", streaming=True) as source, open(part, "wb") as copy:
            while block := source.read(2**22):
                copy.write(block)
                progress(copy.tell())
        if part.stat().st_size != size:
            raise ValueError(f"{part.stat().st_size} bytes came, {size} were announced")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def cached_copy(url: str, cache_dir: str | None = None) -> Path:
    """Copies what a checkpoint needs from a remote folder into a cache folder, once; returns that folder.

    url: what blobfile reads (gs://…, az://…, https://….blob.core.windows.net/…), a folder or a file in it. An
    interrupted copy goes on with the files that are missing. A file that has changed (size or modification
    time) is copied again, one that is gone is deleted.
    """
    file, url = "", url.rstrip("/")
    if CHECKPOINT_FILE.fullmatch(url.rsplit("/", 1)[-1]):
        url, file = url.rsplit("/", 1)
    root = Path(
        cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "llama3_from_scratch"
    )
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder, where = root.expanduser() / f"{url.rsplit('/', 1)[-1]}-{key}", url
    blobfile.configure(
        retry_limit=3, log_callback=lambda message: None
    )  # else it retries for ever, and aloud
    try:
        stats = remote_files(url)
        total, done = sum(stat.size for stat in stats.values()), 0
        for old in folder.rglob("*.copied"):
            if old.relative_to(folder).as_posix().removesuffix(".copied") not in stats:
                old.with_suffix("").unlink(missing_ok=True)
                old.unlink()
        for name, stat in stats.items():
            target, mark, version = (
                folder / name,
                folder / f"{name}.copied",
                f"{stat.size} {stat.mtime}",
            )
            if not (target.is_file() and mark.is_file() and mark.read_text() == version):

                def progress(copied: int, done: int = done) -> None:
                    part = (done + copied) / max(1, total)
                    bar = f"[{'#' * int(30 * part):30}] {part:4.0%} of {total / 1e9:.2f} GB"
                    print(f"\r{url} {bar}", end="", file=sys.stderr)

                where = f"{url}/{name}"
                mark.unlink(missing_ok=True)
                copy_file(where, target, stat.size, progress)
                mark.write_text(version)
                print(file=sys.stderr)
            done += stat.size
    except Exception as problem:  # each cloud has its own
        raise ValueError(
            f"{where}: not copied ({first_line(problem)}); what is whole is kept"
        ) from None
    return folder / file


def local_copy(path: str | Path, cache_dir: str | None) -> Path:
    """A path on this machine; of a remote folder, a copy of it."""
    try:
        if "://" not in str(path):
            return Path(path).expanduser()
        if processes()[1] == 1:
            return cached_copy(str(path), cache_dir)
        from parts import parallel

        return parallel.one_after_the_other(lambda: cached_copy(str(path), cache_dir))
    except RuntimeError as problem:  # ~nobody
        raise ValueError(f"{path}: {first_line(problem)}") from None
