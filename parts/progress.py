"""A line at a terminal's bottom while something takes over a second: how far it is. Gone when done.

How the line reads (bar, rate, time left) is tqdm's affair where tqdm is installed; otherwise it is a counter.
In a pipe or a file there is none.
"""

import contextlib
import functools
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

import llama3_from_scratch as llama
from parts import eager, printable
from parts.table import columns, say_chunk, width_of

PATIENCE = 1.0  # seconds until a line appears
TURN = 0.25  # seconds from one drawing to the next
LOCK = threading.RLock()  # who holds it writes to the terminal
OPEN: list[threading.Event] = []  # one for each `progress` that runs; the last one is drawn
DRAWN: list[str] = []  # what stands on the screen, if anything does


def erase() -> None:
    """Takes away the line that is drawn, so that something else can be written in its place."""
    with LOCK:
        if DRAWN:
            blank = " " * columns(DRAWN.pop())
            print(f"\r{blank}\r", end="", file=sys.stderr, flush=True)


def draw(line: str) -> None:
    """Puts a line in the place of the one that is drawn, at one stroke: so nothing flickers."""
    before = DRAWN.pop() if DRAWN else ""
    rest = " " * (columns(before) - columns(line))
    print("\r" * bool(before) + line + rest, end="", file=sys.stderr, flush=True)
    DRAWN.append(line + rest)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """No line is drawn during a with block, which writes to the terminal itself."""
    with LOCK:
        erase()
        yield


def line_of(what: str, done: float, total: float, unit: str, seconds: float) -> str:
    """How far it is, in one line that fits the terminal."""
    width = width_of(sys.stderr) - 1
    what = printable(what, max(20, width // 2))
    if not total:
        return f"{what} … {seconds:.0f} s"[:width]
    try:
        meter: Any = importlib.import_module("tqdm").tqdm.format_meter
    except ImportError:
        return f"{what}: {done / total:.0%} … {seconds:.0f} s"[:width]
    plain = "utf" not in (sys.stderr.encoding or "").lower()
    scaled = unit == "B"
    named = unit if scaled else f" {unit}"
    return meter(done, total, seconds, width, what, unit=named, unit_scale=scaled, ascii=plain)


@contextlib.contextmanager
def progress(what: str, total: float = 0, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Shows during a with block how far it is. Yields a function that is told how much more is done.

    total: of how much, in units ("B" for bytes); 0: nobody knows. One within another is drawn in its place.
    """
    done: list[float] = [0]

    def advance(more: float) -> None:
        done[0] += more

    if not sys.stderr.isatty():
        yield advance
        return
    started = time.perf_counter()
    over = threading.Event()

    def keep_drawing() -> None:
        while not over.wait(TURN):
            seconds = time.perf_counter() - started
            # A lock that is taken is not waited for: whoever holds it may be waiting for this thread to end.
            if seconds < PATIENCE or OPEN[-1] is not over or not LOCK.acquire(blocking=False):
                continue
            try:
                with contextlib.suppress(OSError, ValueError):  # the terminal has gone
                    draw(line_of(what, int(min(done[0], total)), total, unit, seconds))
            finally:
                LOCK.release()

    thread = threading.Thread(target=keep_drawing, daemon=True)
    OPEN.append(over)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()
        OPEN.remove(over)
        with contextlib.suppress(OSError, ValueError):
            erase()


def prefill(
    tokens: Tensor,
    weights: llama.Weights,
    params: llama.Params,
    cache: llama.Cache,
    start: int = 0,
    *,
    read: llama.Forward | None = None,
    watched: llama.Forward | None = None,
    probe: llama.Probe | None = None,
    **options: Any,
) -> Tensor:
    """The prefill of parts/eager.py; on a terminal it shows how much of a long prompt has been read.

    watched: forward with breakpoints, for each chunk. probe: what writes to the terminal, for the last chunk.
    chunk (as in the script's prefill): for a GPU, and a read that stores no scores. A last chunk that is
    looked at is only as large as its scores fit into memory.
    """

    def ticking(chunk: Tensor, inner: llama.Probe | None) -> llama.Probe:
        def tick(name: str, dims: str, tensor: Tensor) -> Tensor:
            if inner is not None:
                with set_aside():
                    tensor = inner(name, dims, tensor)
            if name.startswith("layers.") and name.count(".") == 2 and name.endswith(".out"):
                advance(chunk.numel() / params["n_layers"])
            return tensor

        return tick

    def counted(chunk: Tensor, *how: Any, inner: llama.Probe | None = None) -> Tensor:
        if watched is not None:
            with set_aside():  # it stops in the debugger
                return functools.partial(watched, probe=ticking(chunk, inner))(chunk, *how)
        if read is None or inner is not None:
            return functools.partial(eager.forward, probe=ticking(chunk, inner))(chunk, *how)
        logits = read(chunk, *how)  # compiled: it takes no probe
        advance(chunk.numel())
        return logits

    def looked_at(chunk: Tensor, *how: Any) -> Tensor:
        _, _, _, positions, _ = how
        with set_aside():
            say_chunk(positions, start)
        return counted(chunk, *how, inner=probe)

    options |= {"read": counted, "watched": looked_at if probe else None}
    ahead = 0
    if probe is not None and "chunk" in options:
        T = tokens.shape[1]
        ahead = max(0, T - eager.chunk_on_gpu(start + T, weights, params))
    with progress("reading the prompt", tokens.numel(), "tok") as advance:
        if ahead > 0:
            before = options | {"watched": None}
            eager.prefill(tokens[:, :ahead], weights, params, cache, start, **before)
        return eager.prefill(tokens[:, ahead:], weights, params, cache, start + ahead, **options)
