"""A page with traces inside: tools/viewer.html and the files of traces, as one file to open and to share."""

import base64
import contextlib
import html
import io
import math
import os
import re
import sys
import tempfile
import webbrowser
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

import llama3_from_scratch as llama
from parts import printable, processes, reason
from parts.files import written_whole
from parts.inside import check_place, save_tensors, save_trace

VIEWER = Path(__file__).resolve().parents[1] / "tools" / "viewer.html"
MARK = '<meta name="generator" content="llama3_from_scratch viewer">'
SLOT = re.compile(
    r'<script type="application/octet-stream" id="trace-(?P<side>[ab])"[^>]*>[^<]*</script>'
)
MOST = 100_000_000  # bytes of tensors in a page that --view writes
LARGEST = 370_000_000  # no browser opens a page of twice as many
# What goes first when a trace is larger: what follows from what stays, what is large and rarely looked at.
SPARED = (
    "feed_forward.gate",
    "feed_forward.up",
    "attention.scores",
    "feed_forward.hidden",
    "ffn_norm",
    "attention_norm",
    "feed_forward.out",
    "attention.out",
    "attention.q",
    "attention.k",
    "attention.heads",
    "after_attention",
    "attention.q_rotated",
    "attention.k_rotated",
    "attention.v",
    "logits",
    "out",
)


def with_traces(traces: list[tuple[str, bytes]]) -> str:
    """tools/viewer.html with one trace inside, or two to compare: (name, content of its file).

    The page may then fetch nothing at all.
    """
    try:
        page = VIEWER.read_text(encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"{VIEWER}: cannot be read ({reason(problem)})") from None
    given = dict(zip("ab", traces))

    def filled(slot: re.Match[str]) -> str:
        name, content = given.get(slot["side"], ("", b""))
        return (
            f'<script type="application/octet-stream" id="trace-{slot["side"]}" '
            f'data-name="{html.escape(name)}">{base64.b64encode(content).decode()}</script>'
        )

    return SLOT.sub(filled, page).replace("connect-src 'self'; ", "", 1)


def part_of(name: str) -> str:
    """A tensor's name without its layer."""
    return re.sub(r"^layers\.\d+\.", "", name)


def within(sizes: dict[str, int], most: int = MOST) -> tuple[list[str], list[str]]:
    """Of tensors, by name, the bytes: the names that stay within `most`, and the parts that are left out."""
    left_out: list[str] = []
    for part in SPARED:
        if sum(sizes.values()) <= most:
            break
        if any(part_of(name) == part for name in sizes):
            left_out.append(part)
            sizes = {name: size for name, size in sizes.items() if part_of(name) != part}
    return list(sizes), left_out


def trace_for_page(path: Path, most: int = MOST) -> tuple[bytes, list[str]]:
    """The content of a trace's file, without what would make a page too large, and what that is.

    "left_out" of its metadata says the same on the page. ValueError if it is too large even so.
    """
    with safetensors.safe_open(path, "pt") as file:
        about: dict[str, str] = file.metadata() or {}
        sizes = {name: bytes_of(file.get_slice(name)) for name in file.keys()}
        names, left_out = within(sizes, most)
        total = sum(sizes[name] for name in names)
        if total > LARGEST:
            raise ValueError(
                f"the trace is too large for one page ({total / 1e6:,.0f} MB without what can be left "
                "out): a shorter prompt, or --save-trace FILE and tools/viewer.html"
            )
        if not left_out:
            return path.read_bytes(), []
        kept: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        smaller = Path(folder) / "smaller.safetensors"
        save_tensors(smaller, kept, about | {"left_out": ", ".join(left_out)})
        return smaller.read_bytes(), left_out


def bytes_of(tensor: Any) -> int:
    """The size of a tensor in a .safetensors file, from its slice: nothing is read."""
    bits = re.search(r"\d+", tensor.get_dtype())  # of BOOL there are 8
    return math.prod(tensor.get_shape()) * int(bits[0] if bits else 8) // 8


def place_for_page(path: str | Path) -> Path:
    """Where a page can be written. ValueError if it cannot, or if something else is there."""
    return check_place(path, is_page, "page")


def is_page(path: Path) -> bool:
    """Is this a page that write_page wrote, or tools/viewer.html?"""
    with open(path, "rb") as file:
        return MARK.encode() in file.read(4096)


def write_page(path: str | Path, page: str) -> Path:
    """Writes a page that holds traces; only such a page, of before, is replaced. Returns where it is."""
    target = place_for_page(path)
    try:
        with written_whole(target) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"{path}: cannot be written ({reason(problem)})") from None
    return target


def open_in_browser(page: Path) -> bool:
    """Opens a page, if somebody sits at a terminal and a browser can show a window. Did it?"""
    windows = sys.platform in ("darwin", "win32") and "SSH_CONNECTION" not in os.environ
    if not (windows or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    if not sys.stderr.isatty():
        return False
    with contextlib.suppress(webbrowser.Error, OSError):
        return webbrowser.open(page.as_uri())
    return False


def view(
    path: str,
    tokens: Tensor,
    model: llama.Model,
    about: dict[str, str],
    only: Iterable[str] = (),
    saved: str | None = None,
) -> None:
    """Writes a page with the trace of one pass over tokens (B T), and opens it where there is a browser.

    about, only: as for save_trace. saved: where that has written this trace, if it has.
    """
    if processes()[0] == 0:
        place_for_page(path)  # better known before the pass than after it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(saved or Path(folder) / "trace.safetensors")
        if saved is None:
            with contextlib.redirect_stderr(io.StringIO()):  # of a file that nobody will see
                save_trace(str(file), tokens, model, about, only)
        if processes()[0] > 0:  # process 0 writes
            return
        content, left_out = trace_for_page(file)
    target = write_page(path, with_traces([(Path(path).stem, content)]))
    words = (
        f"{printable(path)}: a page with the prompt's pass, {target.stat().st_size / 1e6:.1f} MB"
    )
    if left_out:
        words += f", without {', '.join(left_out)} (--save-trace FILE keeps all)"
    opened = open_in_browser(target)
    print(words, file=sys.stderr)
    if not opened:  # on a line of its own, so that nothing breaks it
        print(target.as_uri(), file=sys.stderr)
