"""What the command line shows of a pass: the table of shapes, its key and colours, lines that fit."""

import fnmatch
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from torch import Tensor

import llama3_from_scratch as llama

KEY = {  # the letters of the script's docstring
    "B": "batch",
    "T": "new tokens",
    "S": "positions they see",
    "D": "model dim",
    "H": "query heads",
    "K": "key/value heads",
    "E": "head dim",
    "F": "feed-forward dim",
    "V": "vocabulary",
}
# Of each letter, one of a terminal's own colours: those can be read on light and on dark.
COLOURS = dict(zip("BTSDHKEFV", ("2", "1", "95", "36", "33", "35", "32", "34", "31")))
DIM = "2"
LAYERS_SHOWN = ("all", "first", "none")  # what --show may say beside a glob


# ------------------------------------------------------------------------------------ a terminal


def wants_colour(choice: str, stream: Any) -> bool:
    """Is a stream written to in colours? choice: always, never, or auto: on a terminal without NO_COLOR."""
    if choice != "auto":
        return choice == "always"
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"  # no-color.org
    return bool(stream.isatty()) and not plain


def painted(text: str, colour: str, on: bool = True) -> str:
    """Text in a colour, as a terminal understands it; as it is unless on."""
    return f"\x1b[{colour}m{text}\x1b[0m" if on and colour else text


def width_of(stream: Any) -> int:
    """How many columns a terminal has; 0 for a file or a pipe."""
    if not stream.isatty():
        return 0
    try:
        found = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # a test's
        found = 0
    asked = os.environ.get("COLUMNS", "")
    return (int(asked) if asked.isdecimal() else 0) or found or 80


ESCAPE = re.compile("\x1b\\[[0-9;]*m")


def columns(text: str) -> int:
    """How many columns a text takes on a terminal: Chinese letters two, combining ones and colours none."""
    text = ESCAPE.sub("", text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def folded(pieces: list[str], gap: str, width: int, indent: str = "  ") -> str:
    """Pieces side by side in lines of this width, all but the first line indented; 0: in one line."""
    lines = [""]
    for n, piece in enumerate(pieces):
        longer = lines[-1] + gap * (n > 0) + piece
        comma = len(gap.rstrip()) if n + 1 < len(pieces) else 0
        if n and width and columns(longer) + comma > width:
            lines[-1] += gap.rstrip()
            lines.append(f"{indent}{piece}")
        else:
            lines[-1] = longer
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ numbers


def size(n_bytes: float) -> str:
    """A number of bytes, short: 7 MB, 2.5 GB."""
    sizes = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit, per in sizes.items() if n_bytes >= per), "kB")
    value = n_bytes / sizes[unit]
    return f"{value:.{1 if value < 9.95 else 0}f} {unit}".replace(".0 ", " ")


def many(count: float) -> str:
    """A number of parameters, short: 3.5 M, 1.24 B."""
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def plural(count: int, noun: str) -> str:
    """A number of things: 1 layer, 3 layers, 1,203 tokens."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def rate(count: float, seconds: float) -> str:
    """Words for so many in so many seconds, with three digits: ", 316/s", ", 40.2/s"; none for nothing."""
    if not count or seconds <= 0:
        return ""
    a_second = count / seconds
    digits = 0 if a_second >= 100 else 1 if a_second >= 10 else 2
    return f", {a_second:,.{digits}f}/s"


def likelihood(p: float) -> str:
    """A probability in percent, which never reads as nothing or as all."""
    if p < 0.0005:
        return "<0.1%"
    return ">99.9%" if p >= 0.9995 else f"{p:.1%}"


# ------------------------------------------------------------------------------------ the table


def chosen(name: str, which: str | Iterable[str]) -> bool:
    """Is a name one of "all", of the "first" layer, of "none", or matched by a glob, or by one of several?"""
    if which in LAYERS_SHOWN:
        first = name.startswith("layers.0.") or not name.startswith("layers.")
        return which == "all" or (which == "first" and first)
    patterns = [which] if isinstance(which, str) else which
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def tokens_at(positions: Tensor) -> str:
    """Which tokens stand at positions (B T), in words."""
    return f"tokens {int(positions.min())} to {int(positions.max())}"


def say_chunk(positions: Tensor, start: int) -> None:
    """Says on stderr of which tokens shapes are, unless the prompt, from position start on, is one chunk."""
    if int(positions.min()) > start:
        which = tokens_at(positions)
        print(f"read in chunks; these are the shapes of the last, {which}", file=sys.stderr)


def key_of(sizes: dict[str, int], colour: bool) -> str:
    """The letters, their sizes and what they are."""
    pieces = [
        f"{painted(f'{letter} {sizes[letter]}', COLOURS[letter], colour)} {words}"
        for letter, words in KEY.items()
    ]
    return folded(pieces, "   ", width_of(sys.stderr) or 80, indent="")


def in_colours(words: list[str], letters: list[str], colour: bool) -> str:
    """Words side by side, each in the colour of its letter."""
    return " ".join(
        painted(word, COLOURS.get(letter, ""), colour) for word, letter in zip(words, letters)
    )


def shape_table(
    which: str, params: llama.Params, positions: int, colour: bool = False
) -> llama.Probe:
    """A probe that writes a pass as a table on stderr: a key of the letters, then a row for each tensor.

    which: "all" layers, the "first", or a glob pattern of names. positions: how many the last token sees.
    A shape that is that of the row above reads as such: its letters say which it is.
    """
    L = params["n_layers"]
    widths = [len(f"layers.{0 if which == 'first' else L - 1}.attention.q_rotated"), 7, 0, 0]
    sizes: dict[str, int] = {}
    above: list[Any] = []

    def row(*cells: str) -> None:
        gaps = [" " * (width - columns(cell) + 2) for width, cell in zip(widths, cells)]
        print("".join(cell + gap for cell, gap in zip(cells, gaps)).rstrip(), file=sys.stderr)

    def head(tokens: Tensor) -> None:
        B, T = tokens.shape
        D, H, K, E = (params[key] for key in ("dim", "n_heads", "n_kv_heads", "head_dim"))
        F, V, S = params["ffn_dim"], params["vocab_size"], positions
        print(key_of(dict(B=B, T=T, S=S, D=D, H=H, K=K, E=E, F=F, V=V), colour), file=sys.stderr)
        shapes = [(B, H, T, S), (B, H, T, E), (B, T, D), (B, T, F), (B, 1, V)]
        widths[2] = max(len(" ".join(map(str, shape))) for shape in shapes)
        row(*(painted(word, DIM, colour) for word in ("tensor", "dims", "shape", "dtype")))

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        if name == "tokens":
            sizes.clear()  # of a chunk before this one
            above.clear()
            if not widths[2]:
                head(tensor)
        llama.check_dims(sizes, name, dims, tensor)
        if chosen(name, which):
            letters = dims.split()
            shape = in_colours([str(n) for n in tensor.shape], letters, colour)
            cells = [shape, str(tensor.dtype).removeprefix("torch.")]
            found = [dims, tensor.shape, tensor.dtype]
            same = [painted('"', DIM, colour)] * 2
            row(name, in_colours(letters, letters, colour), *(same if found == above else cells))
            above[:] = found
        elif which == "first" and name == "layers.1.attention_norm":
            print(f"and the same in the other {plural(L - 1, 'layer')}", file=sys.stderr)
        return tensor

    return probe
