"""The pictures of walkthrough.md. Each function draws one, under the name of its file.

What is drawn is rounded first, so that the same numbers up to their last bits give the same picture.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from parts.table import likelihood
from walkthrough import drawing
from walkthrough.drawing import (
    WIDTH,
    dot,
    frame,
    letters,
    level,
    page,
    path,
    rect,
    signed_level,
    squares,
    text,
)


def label(word: str, most: int = 13) -> str:
    """A token as it is written in a picture: a dot for a space, no line breaks, not too long."""
    word = repr(word)[1:-1].replace(" ", "·").replace("<|begin_of_text|>", "begin")
    return word if len(word) <= most else word[: most - 1] + "…"


# ------------------------------------------------------------------------------------ shapes


def product(name: str, *parts: str | Tensor) -> None:
    """A × B = C as rectangles to scale, letters checked. parts: "title: T D" and a tensor, three times."""
    sizes: dict[str, int] = {}
    sides, tensors = [], []
    for words, tensor in zip(parts[::2], parts[1::2], strict=True):
        assert isinstance(words, str) and isinstance(tensor, Tensor)
        title, dims = words.rsplit(": ", 1)
        shape = tensor.shape[-2:]
        for letter, size in zip(dims.split(), shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{title}: {letter} is {sizes[letter]} and {size}")
        sides.append((title, dims.split(), shape))
        tensors.append(tensor)
    scale = 120 / max(sizes.values())

    def side(size: int) -> float:
        return max(7.0, size * scale)

    tallest = max(side(shape[0]) for _, _, shape in sides)
    wide = sum(max(96.0, side(shape[1])) for _, _, shape in sides)
    gap = min(120.0, (WIDTH - 60 - wide) / len(sides))
    x = (WIDTH - wide - gap * (len(sides) - 1)) / 2
    top, middle = 42.0, 42 + tallest / 2
    body = []
    for place, (title, (row, column), shape) in enumerate(sides):
        room, w, h = max(96.0, side(shape[1])), side(shape[1]), side(shape[0])
        left, y = x + (room - w) / 2, middle - h / 2
        body += [
            rect(left, y, w, h, "side"),
            frame(left, y, w, h),
            rect(left, y - 2, w, 4, column),
            rect(left - 2, y, 4, h, row),
            letters(left + w / 2, y - 8, [(f"{column} {shape[1]}", column)]),
            letters(left - 7, middle + 4, [(f"{row} {shape[0]}", row)], at="end"),
            text(left + w / 2, top + tallest + 20, title, at="middle", size=12.5, bold=True),
        ]
        if max(sizes.values()) <= 4:  # room for the numbers themselves
            values = tensors[place].tolist()
            body += [
                text(left + (c + 0.5) * scale, y + (r + 0.5) * scale + 5, f"{v:g}", at="middle")
                for r, line in enumerate(values)
                for c, v in enumerate(line)
            ]
        if place < len(sides) - 1:
            sign = "=" if place == len(sides) - 2 else "×"
            body.append(text(x + room + gap / 2 - 14, middle + 6, sign, "faint", 18, "middle"))
        x += room + gap
    (_, _, one), (_, _, two), (_, _, three) = sides
    said = "{} × {} times {} × {} gives {} × {}".format(*one, *two, *three)
    body.append(text(WIDTH / 2, top + tallest + 44, said, "faint", 12, "middle"))
    drawing.display(name, page(said, body, top + tallest + 58))


# ------------------------------------------------------------------------------------ attention


def grid_of(
    body: list[str],
    x: float,
    y: float,
    size: float,
    values: Tensor,
    fills: dict[tuple[int, int], str],
) -> None:
    """A square grid in a frame."""
    rows, columns = values.shape
    body.append(rect(x, y, size * columns, size * rows, "h0"))
    body += squares(x, y, [(r, c, fill) for (r, c), fill in fills.items()], size, size)
    body.append(frame(x, y, size * columns, size * rows))


def share_fills(shares: Tensor, power: float = 1) -> dict[tuple[int, int], str]:
    return {
        (r, c): level(share**power)
        for r, row in enumerate(shares.tolist())
        for c, share in enumerate(row)
        if level(share**power) != "h0"
    }


def score_fills(scores: Tensor) -> dict[tuple[int, int], str]:
    """Signed numbers; a grey where there is minus infinity."""
    most = scores[scores.isfinite()].abs().max().item() or 1
    return {
        (r, c): "mask" if score == -math.inf else signed_level(score / most)
        for r, row in enumerate(scores.tolist())
        for c, score in enumerate(row)
    }


def names_beside(
    body: list[str], x: float, y: float, size: float, words: Sequence[str], font: float
) -> None:
    for place, word in enumerate(words):
        body.append(
            text(x - 5, y + (place + 0.72) * size, label(word), "ink", font, "end", mono=True)
        )


def names_below(
    body: list[str], x: float, y: float, size: float, words: Sequence[str], font: float
) -> None:
    for place, word in enumerate(words):
        body.append(
            text(
                x + (place + 0.72) * size,
                y + 5,
                label(word),
                "ink",
                font,
                "end",
                mono=True,
                turned=True,
            )
        )


def three_steps(
    name: str, before: Tensor, masked: Tensor, probs: Tensor, words: Sequence[str]
) -> None:
    """Scores, scores with the mask, and shares (T T each), side by side."""
    size = (WIDTH - 120 - 3 * 14) / 3 / len(words)
    body: list[str] = []
    panels = (
        ("1. scores", "red is high, blue is low", before, score_fills(before)),
        ("2. with the mask", "grey is minus infinity", masked, score_fills(masked)),
        ("3. after softmax", "shares: each row adds up to 1", probs, share_fills(probs, 0.5)),
    )
    low = 52 + size * len(words)
    for place, (title, said, values, fills) in enumerate(panels):
        x = 112 + place * (size * len(words) + 14)
        body += [text(x, 20, title, size=13, bold=True), text(x, 38, said, "faint", 11.5)]
        grid_of(body, x, 48, size, values, fills)
        names_below(body, x, low, size, words, 9.5)
    names_beside(body, 112, 48, size, words, 10.5)
    drawing.display(name, page("scores, scores with the mask, shares", body, low + 84))


def attention(
    name: str, maps: Sequence[Tensor], titles: Sequence[str], words: Sequence[str], across: int = 4
) -> None:
    """Who looks (rows) at whom (columns), in heads beside each other."""
    across = min(across, len(maps))
    size = min(26.0, (WIDTH - 112 - 12 * across) / across / len(words))
    side = size * len(words)
    body: list[str] = []
    rows = -(-len(maps) // across)
    font = min(11.0, max(6.5, size * 0.95))
    for place, (shares, title) in enumerate(zip(maps, titles)):
        row, column = divmod(place, across)
        x, y = 104 + column * (side + 12), 30 + row * (side + 34)
        body.append(text(x, y - 8, title, size=12, bold=True))
        grid_of(body, x, y, size, shares, share_fills(shares))
        if column == 0:
            names_beside(body, x, y, size, words, font)
        if place + across >= len(maps):
            names_below(body, x, y + side, size, words, font)
    longest = max(len(label(word)) for word in words)
    high = 30 + rows * (side + 34) - 34 + 32 + 0.62 * font * longest
    body.append(text(WIDTH - 8, high - 6, "rows look, columns are looked at", "faint", 11, "end"))
    drawing.display(name, page("attention of " + ", ".join(titles), body, high))


# ------------------------------------------------------------------------------------ charts


def axes(
    body: list[str],
    box: tuple[float, float, float, float],
    x_ticks: dict[float, str],
    y_ticks: dict[float, str],
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Lines and words around a chart. box: left, top, width, height; ticks: at 0 to 1 of the room."""
    x, y, w, h = box
    for part, words in y_ticks.items():
        at = y + h * (1 - part)
        body += [
            path(f"M{x:g} {at:.1f}h{w:g}", "line", 1),
            text(x - 6, at + 4, words, "faint", 11, "end"),
        ]
    for part, words in x_ticks.items():
        at = x + w * part
        body += [
            path(f"M{at:.1f} {y + h:g}v4", "faint", 1),
            text(at, y + h + 17, words, "faint", 11, "middle"),
        ]
    if x_label:
        body.append(text(x + w / 2, y + h + 36, x_label, "ink", 12, "middle"))
    if y_label:
        body.append(text(x, y - 12, y_label, "ink", 12))


def line_of(
    values: Sequence[float], box: tuple[float, float, float, float], low: float, high: float
) -> str:
    x, y, w, h = box
    steps = max(1, len(values) - 1)
    points = [
        f"{x + w * k / steps:.1f} {y + h * (1 - (v - low) / (high - low)):.1f}"
        for k, v in enumerate(values)
    ]
    return "M" + "L".join(points)


def curves(
    name: str,
    ys: dict[str, Sequence[float]],
    x_ticks: dict[float, str],
    y_ticks: dict[float, str],
    x_label: str = "",
    y_label: str = "",
    dots: bool = False,
    height: float = 210,
    log: bool = False,
    notes: dict[int, str] | None = None,
) -> None:
    """Lines over evenly spaced x; ticks by place (x), by value (y). notes: words at places of the first."""
    scaled = {key: [math.log10(v) if log else v for v in map(float, y)] for key, y in ys.items()}
    marks = {math.log10(value) if log else value: words for value, words in y_ticks.items()}
    low = min([*marks, *(min(y) for y in scaled.values())])
    high = max([*marks, *(max(y) for y in scaled.values())])
    box = (70.0, 40.0, WIDTH - 100.0, height)
    body: list[str] = []
    count = len(next(iter(scaled.values()))) - 1
    axes(
        body,
        box,
        {at / count: words for at, words in x_ticks.items()},
        {(value - low) / (high - low): words for value, words in marks.items()},
        x_label,
        y_label,
    )
    at = WIDTH - 30.0
    for place, (key, y) in reversed([*enumerate(scaled.items())]):
        body.append(path(line_of(y, box, low, high), f"c{place}", 2))
        if dots:
            for k, v in enumerate(y):
                body.append(
                    dot(
                        box[0] + box[2] * k / count,
                        box[1] + box[3] * (1 - (v - low) / (high - low)),
                        3,
                        f"c{place}",
                    )
                )
        if key:
            body.append(text(at, 22, f"— {key}", f"c{place}", 12.5, "end", bold=True))
            at -= 7.2 * len(key) + 40
    for place, words in (notes or {}).items():
        value = next(iter(scaled.values()))[place]
        x, y_at = (
            box[0] + box[2] * place / count,
            box[1] + box[3] * (1 - (value - low) / (high - low)),
        )
        body += [
            dot(x, y_at, 4, "c1"),
            path(f"M{x + 4:.1f} {y_at - 3:.1f}L{x + 34:.1f} {box[1] + 14:g}", "c1"),
        ]
        body.append(text(x + 38, box[1] + 16, words, "c1", 12.5, bold=True))
    drawing.display(name, page(y_label or name, body, 40 + height + 46))


def bars(
    name: str, panels: dict[str, tuple[Sequence[str], Sequence[float]]], across: int = 2
) -> None:
    """Probabilities, a panel for each title: words and their probabilities."""
    across = min(across, len(panels))
    wide = (WIDTH - 16.0) / across
    body: list[str] = []
    y = 0.0
    titles = list(panels.items())
    for start in range(0, len(titles), across):
        row = titles[start : start + across]
        for column, (title, (words, shares)) in enumerate(row):
            x = 8 + column * wide
            body.append(text(x + 4, y + 22, title, size=13, bold=True))
            names = min(110.0, wide * 0.36)
            room = wide - names - 62
            cut = (
                "top" in title
            )  # what top-k and top-p leave out is nothing, the others' least is not
            for place, (word, share) in enumerate(zip(words, shares)):
                at = y + 34 + 19 * place
                shown = "0" if cut and not share else likelihood(share)
                body += [
                    text(x + names - 6, at + 12, label(word, 15), size=12, at="end", mono=True),
                    rect(x + names, at + 1, max(1.0, room * round(float(share), 3)), 14, "c0", 2),
                    text(
                        x + names + max(1.0, room * float(share)) + 5,
                        at + 12.5,
                        shown,
                        "faint",
                        11.5,
                    ),
                ]
        y += 46 + 19 * max(len(words) for _, (words, _) in row)
    drawing.display(name, page("probabilities: " + ", ".join(panels), body, y))


def turning(name: str, turns: Tensor, degrees: Sequence[float]) -> None:
    """An arrow to the right as some pairs turn it: turns (positions, pairs) of length 1."""
    pairs = min(4, turns.shape[1])
    body: list[str] = []
    r = 74.0
    for pair in range(pairs):
        x, y = WIDTH * (pair + 0.5) / pairs, 126.0
        body.append(
            text(
                x,
                22,
                f"pair {pair}: {degrees[pair]:.3g}° a position",
                size=13,
                at="middle",
                bold=True,
            )
        )
        body.append(f'<circle class="s-line" fill="none" cx="{x:g}" cy="{y:g}" r="{r:g}"/>')
        for position, (right, up) in enumerate(torch.view_as_real(turns[:, pair]).tolist()):
            body.append(path(f"M{x:g} {y:g}L{x + r * right:.1f} {y - r * up:.1f}", "c1", 1.6))
            if degrees[pair] > 8 or position in (
                0,
                len(turns) - 1,
            ):  # else they would lie on each other
                body.append(
                    text(
                        x + 1.16 * r * right,
                        y - 1.16 * r * up + 4,
                        str(position),
                        "ink",
                        11,
                        "middle",
                    )
                )
    drawing.display(name, page("how four pairs turn from position to position", body, 226))


def gate(name: str, z: Tensor, parts: dict[str, Tensor], words: Sequence[str], title: str) -> None:
    """Where tokens fall on the curve of the gate, and a unit's gate, up and hidden for each token."""
    body: list[str] = [text(20, 20, "gate = SiLU(z)", size=13, bold=True)]
    reach = max(4, math.ceil(z.abs().max().item() + 0.5))
    left = (44.0, 40.0, 240.0, 190.0)
    low, high = -1.0, float(reach)
    ticks = {0.0: str(-reach), 0.5: "0", 1.0: str(reach)}
    axes(
        body,
        left,
        ticks,
        {1 / (high - low): "0", 1.0: str(reach)},
        "z, the unit's answer to the token",
    )
    line = torch.linspace(-reach, reach, 81)
    body.append(path(line_of(torch.nn.functional.silu(line).tolist(), left, low, high), "c0", 2))
    for a, b in zip(z.tolist(), parts["gate"].tolist()):
        body.append(
            dot(
                left[0] + left[2] * (a + reach) / 2 / reach,
                left[1] + left[3] * (1 - (b - low) / (high - low)),
                4,
                "c1",
            )
        )
    every = torch.stack(list(parts.values()))
    bottom, top = min(0.0, every.min().item()), max(0.0, every.max().item())
    x, y, w, h = 330.0, 40.0, WIDTH - 345.0, 190.0
    zero = y + h * top / (top - bottom)
    body.append(text(x, 20, title, size=13, bold=True))
    step = w / len(words)
    for place, (part, values) in enumerate(parts.items()):
        body.append(text(x + 220 + 90 * place, 20, f"■ {part}", f"c{place + 1}", 12.5, bold=True))
        for token, value in enumerate(values.tolist()):
            size = abs(value) / (top - bottom) * h
            body.append(
                rect(
                    x + token * step + place * step * 0.27 + 2,
                    zero - size if value > 0 else zero,
                    step * 0.25,
                    size,
                    f"c{place + 1}",
                )
            )
    body.append(path(f"M{x:g} {zero:.1f}h{w:g}", "faint", 1))
    names_below(body, x, y + h + 4, step, words, 11)
    drawing.display(name, page(title, body, 326))


def lens(
    name: str,
    words: Sequence[Sequence[str]],
    probs: Tensor,
    layers: Sequence[int],
    after: Sequence[str],
    title: str,
) -> None:
    """The likeliest next token (words and probs, by token and layer) after each of these layers."""
    left, top, h = 104.0, 54.0, 22.0
    w = (WIDTH - left - 8) / len(layers)
    body = [text(left, 20, title, size=13, bold=True), text(8, 44, "after the token", "faint", 11)]
    cells = [(r, c, level(p)) for r, row in enumerate(probs.tolist()) for c, p in enumerate(row)]
    body += squares(left, top, cells, w, h)
    for column, layer in enumerate(layers):
        body.append(text(left + (column + 0.5) * w, 46, f"layer {layer}", "faint", 11, "middle"))
    most = max(3, int((w - 4) / 6.4))
    for row, line in enumerate(words):
        body.append(
            text(left - 6, top + row * h + 15, label(after[row]), "ink", 11, "end", mono=True)
        )
        for column, word in enumerate(line):
            ink = "on-" + level(probs[row, column].item())
            body.append(
                text(
                    left + (column + 0.5) * w,
                    top + row * h + 15,
                    label(word, most),
                    ink,
                    10.5,
                    "middle",
                    mono=True,
                )
            )
    body.append(frame(left, top, w * len(layers), h * len(after)))
    drawing.display(name, page(title, body, top + h * len(after) + 10))


def grid(name: str, shares: Tensor, rows: Sequence[str], title: str) -> None:
    """Shares of 0 to 1, each written into its square: a row for each layer, a column for each head."""
    columns = [f"without {n}" if shares.shape[1] <= 9 else str(n) for n in range(shares.shape[1])]
    left, top, h = 84.0, 56.0, 30.0
    w = (WIDTH - left - 8) / len(columns)
    body = [text(left, 20, title, size=13, bold=True)]
    body += squares(
        left,
        top,
        [(r, c, level(p)) for r, row in enumerate(shares.tolist()) for c, p in enumerate(row)],
        w,
        h,
    )
    for column, words in enumerate(columns):
        body.append(text(left + (column + 0.5) * w, 46, words, "faint", 11.5, "middle"))
    for row, line in enumerate(shares.tolist()):
        body.append(text(left - 8, top + row * h + 19, rows[row], "ink", 12, "end"))
        for column, share in enumerate(line):
            ink = "on-" + level(share)
            body.append(
                text(
                    left + (column + 0.5) * w,
                    top + row * h + 19,
                    f"{share:.0%}",
                    ink,
                    min(12.0, w / 3.4),
                    "middle",
                )
            )
    body.append(frame(left, top, w * len(columns), h * len(rows)))
    drawing.display(name, page(title, body, top + h * len(rows) + 12))


def errors(name: str, row: Sequence[float], panels: dict[str, Sequence[float]], group: int) -> None:
    """Numbers as bars, and below, to one scale of their own, how far each of several roundings is off."""
    body: list[str] = []
    worst = max(abs(e) for each in panels.values() for e in each)
    step, x = (WIDTH - 90) / len(row), 76.0
    y = 34.0
    for place, (title, values) in enumerate([("the row", row), *panels.items()]):
        most = worst if place else max(map(abs, row))
        high = 84.0 if place else 120.0
        zero = y + high / 2
        said = title if not place else f"error: {title}"
        body.append(text(x, y - 8, said, size=12.5, bold=True))
        for at in range(0, len(row) + 1, group):
            body.append(path(f"M{x + at * step:.1f} {y:g}v{high:g}", "line", 1))
        for value in (-most, most):
            at = zero - value / most * high / 2
            body.append(text(x - 6, at + 4, f"{value:.3f}", "faint", 10.5, "end"))
        strokes = "".join(
            f"M{x + (k + 0.5) * step:.1f} {zero:g}V{zero - v / most * high / 2:.1f}"
            for k, v in enumerate(values)
        )
        body += [
            path(strokes, "c4" if place else "c0", max(1.2, step * 0.6)),
            path(f"M{x:g} {zero:g}h{WIDTH - 90:g}", "faint", 1),
        ]
        y += high + 36
    drawing.display(name, page("numbers and their rounding errors", body, y - 20))
