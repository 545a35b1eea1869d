"""Pictures as SVG text: a few shapes, colours for light and for dark, and where a finished picture goes.

No picture has a colour of its own: it names one ("ink", "D", "h3"), and the file's style says what that is
on white paper and on dark. Letters have the hues that the script's table gives them, shares and signed
numbers the viewer's.
Why not matplotlib: it knows one theme a file, and cannot draw the map.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from parts.table import COLOURS

WIDTH = 830  # what GitHub shows of a picture in a text
SANS = "system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
# A terminal's colours as they can be read on paper, light and dark.
TERMINAL = {
    "2": ("#59636e", "#9198a1"),
    "1": ("#1f2328", "#f0f6fc"),
    "95": ("#bf3989", "#ff8bd0"),
    "36": ("#00707a", "#39c5cf"),
    "33": ("#8a6100", "#e3b341"),
    "35": ("#8250df", "#c297ff"),
    "32": ("#1a7f37", "#56d364"),
    "34": ("#0969da", "#6cb6ff"),
    "31": ("#cf222e", "#ff7b72"),
}
NAMED = {
    "paper": ("#ffffff", "#0d1117"),
    "side": ("#f3f5f8", "#161b22"),
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "line": ("#d1d9e0", "#3d444d"),
    "stream": ("#c3cbd4", "#454d58"),
    "mask": ("#c9ced4", "#3d444d"),
    "c0": ("#0969da", "#6cb6ff"),
    "c1": ("#bc4c00", "#ffa657"),
    "c2": ("#1a7f37", "#56d364"),
    "c3": ("#8250df", "#c297ff"),
    "c4": ("#cf222e", "#ff7b72"),
    **{letter: TERMINAL[code] for letter, code in COLOURS.items()},
    "G": TERMINAL["33"],  # the table has no G: it is of H
    "HE": TERMINAL["33"],
    "GT": TERMINAL["1"],
}
# From the least to the most, as in tools/viewer/colors.js; of signed numbers zero is in the middle.
RAMPS = {
    "h": (((255, 255, 255), (158, 202, 225), (8, 69, 148)), ((21, 24, 29), (33, 102, 172), (222, 238, 255))),
    "t": (((33, 102, 172), (250, 250, 250), (178, 24, 43)), ((96, 165, 250), (24, 27, 33), (255, 128, 110))),
}  # fmt: skip
LEVELS = 20


def between(ramp: Iterable[tuple[int, int, int]], t: float) -> tuple[int, ...]:
    """A colour of a ramp of three, at t from 0 to 1."""
    low, middle, high = ramp
    a, b, u = (low, middle, 2 * t) if t < 0.5 else (middle, high, 2 * t - 1)
    return tuple(round(x + (y - x) * u) for x, y in zip(a, b))


def inked(colour: tuple[int, ...]) -> str:
    """Black or white, whichever is read better on a colour."""
    r, g, b = ((part / 255) ** 2.2 for part in colour)
    return "#000000" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 else "#ffffff"


def hues(name: str) -> tuple[str, str]:
    """The light and the dark colour of a name; of "h5" that of 5/20 of the most, of "on-h5" the ink on it."""
    found = re.fullmatch(r"(on-)?([ht])(\d+)", name)
    if not found:
        return NAMED[name]
    colours = [between(ramp, int(found[3]) / LEVELS) for ramp in RAMPS[found[2]]]
    if found[1]:
        return inked(colours[0]), inked(colours[1])
    light, dark = ("#" + "".join(f"{part:02x}" for part in colour) for colour in colours)
    return light, dark


def page(title: str, body: Iterable[str], height: float, width: float = WIDTH) -> str:
    """A whole picture: its shapes on paper, and the colours that they name."""
    inside = "\n".join(body)
    used = sorted({*re.findall(r'class="(?:f|s)-([\w-]+)', inside), "paper"})
    rules: list[list[str]] = [[], []]
    for name in used:
        for into, colour in zip(rules, hues(name)):
            into.append(f".f-{name}{{fill:{colour}}}.s-{name}{{stroke:{colour}}}")
    style = f"text{{font-family:{SANS}}}.m{{font-family:{MONO}}}" + "".join(rules[0])
    dark = "@media (prefers-color-scheme:dark){" + "".join(rules[1]) + "}"
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{style}{dark}</style>\n"
        f'<rect class="f-paper" width="{width:g}" height="{height:g}" rx="6"/>\n{inside}\n</svg>\n'
    )


def n(value: float) -> str:
    """A number of a picture, to a tenth of a pixel."""
    return f"{round(float(value), 1) + 0:g}"


def rect(x: float, y: float, w: float, h: float, fill: str, rx: float = 0, more: str = "") -> str:
    corner = f' rx="{n(rx)}"' if rx else ""
    return f'<rect class="f-{fill}" x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}"{corner}{more}/>'


def frame(x: float, y: float, w: float, h: float, stroke: str = "line", rx: float = 0) -> str:
    corner = f' rx="{n(rx)}"' if rx else ""
    place = f'x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}"'
    return f'<rect class="s-{stroke}" fill="none" {place}{corner}/>'


def path(d: str, stroke: str, width: float = 1.3, more: str = "") -> str:
    return f'<path class="s-{stroke}" fill="none" stroke-width="{n(width)}" d="{d}"{more}/>'


def dot(x: float, y: float, r: float, fill: str) -> str:
    return f'<circle class="f-{fill}" cx="{n(x)}" cy="{n(y)}" r="{n(r)}"/>'


def text(
    x: float,
    y: float,
    words: str,
    fill: str = "ink",
    size: float = 12,
    at: str = "start",
    bold: bool = False,
    mono: bool = False,
    turned: bool = False,
) -> str:
    """Words at a place: their start, middle or end. turned: upwards."""
    weight = ' font-weight="600"' if bold else ""
    anchor = f' text-anchor="{at}"' if at != "start" else ""
    turn = f' transform="rotate(-90 {n(x)} {n(y)})"' if turned else ""
    kind = " m" if mono else ""
    kept = ' xml:space="preserve"' if mono else ""
    return (
        f'<text class="f-{fill}{kind}" x="{n(x)}" y="{n(y)}" font-size="{n(size)}"'
        f"{weight}{anchor}{turn}{kept}>{escape(words)}</text>"
    )


def letters(
    x: float, y: float, pieces: list[tuple[str, str]], size: float = 11, at: str = "middle"
) -> str:
    """Pieces in their colours, one after the other: [("T 18", "T"), …]."""
    spans = [
        f'<tspan class="f-{fill}">{escape(words)}</tspan>'
        if fill == "faint"
        else f'<tspan class="f-{fill}" font-weight="600">{escape(words)}</tspan>'
        for words, fill in pieces
    ]
    return (
        f'<text class="f-ink m" x="{n(x)}" y="{n(y)}" font-size="{n(size)}" text-anchor="{at}"'
        f' xml:space="preserve">{"".join(spans)}</text>'
    )


def squares(
    x: float, y: float, cells: Iterable[tuple[float, float, str]], w: float, h: float
) -> list[str]:
    """Squares (row, column, colour) of a grid: one path for each colour."""
    paths: dict[str, list[str]] = {}
    for row, column, fill in cells:
        paths.setdefault(fill, []).append(
            f"M{n(x + column * w)} {n(y + row * h)}h{n(w)}v{n(h)}h{n(-w)}z"
        )
    return [f'<path class="f-{fill}" d="{"".join(ds)}"/>' for fill, ds in paths.items()]


def tiny_squares(x: float, y: float, fills: Sequence[Sequence[str]], size: float) -> str:
    """A small grid, row by row: neighbours of one colour are one stroke."""
    strokes: dict[str, list[str]] = {}
    for row, line in enumerate(fills):
        column = 0
        for fill, run in groupby(line):
            count = len([*run])
            strokes.setdefault(fill, []).append(f"M{column} {row}h{count}")
            column += count
    paths = [f'<path class="s-{fill}" d="{"".join(ds)}"/>' for fill, ds in strokes.items()]
    place = f"translate({n(x)} {n(y + size / 2)}) scale({size:g})"
    return f'<g transform="{place}" shape-rendering="crispEdges">{"".join(paths)}</g>'


def level(share: float) -> str:
    """The colour of a share of 0 to 1."""
    return f"h{round(max(0.0, min(1.0, share)) * LEVELS)}"


def signed_level(part: float) -> str:
    """The colour of a number of -1 to 1; by the root of its size, as in the viewer."""
    part = max(-1.0, min(1.0, part))
    root = abs(part) ** 0.5 * (1 if part > 0 else -1)
    return f"t{round((1 + root) / 2 * LEVELS)}"


def display(name: str, svg: str) -> None:
    """Where a picture goes: into a notebook, if this is one. build.py collects them instead."""
    if "IPython" in sys.modules:
        from IPython import display as notebook

        notebook.display(notebook.SVG(svg))
