"""The map of a pass, as in tools/viewer: every tensor of one layer a box, placed by what it is made of.

Names, letters and sizes come from a real pass; where boxes stand is as in tools/viewer/places.js.
"""

from collections import namedtuple

from torch import Tensor

import llama3_from_scratch as llama
from walkthrough import drawing
from walkthrough.drawing import frame, letters, page, path, rect, text, tiny_squares
from walkthrough.pictures import score_fills, share_fills

WIDE, BOX, GAP, STRIP = 830.0, 40.0, 25.0, 26.0
TRUNK_WIDE, LANE, PAD = 156.0, 50.0, 8.0
FEW, SQUARE = 8, 3.5  # how many tokens and numbers of a tensor are drawn in its box, how large
TRUNK = -1.0  # the residual stream's own column, left of the three others
# Row, first and last column (in thirds of the room beside the trunk), as in places.js.
PLACES = {
    "tok_embeddings": (0, TRUNK, 0.0), "tokens": (0, 0.0, 3.0),
    "attention_norm": (1, 0.0, 1.0),
    "attention.q": (2, 0.0, 1.0), "attention.k": (2, 1.0, 2.0), "attention.v": (2, 2.0, 3.0),
    "attention.q_rotated": (3, 0.0, 1.0), "attention.k_rotated": (3, 1.0, 2.0),
    "attention.scores": (4, 0.0, 1.22), "attention.probs": (4, 1.6, 2.82),
    "attention.heads": (5, 2.0, 3.0), "attention.out": (5, 0.0, 1.0),
    "after_attention": (6, TRUNK, 0.0), "ffn_norm": (6, 0.0, 1.0),
    "feed_forward.gate": (7, 1.0, 2.0), "feed_forward.up": (7, 2.0, 3.0),
    "feed_forward.hidden": (8, 1.6, 2.6), "feed_forward.out": (8, 0.0, 1.0),
    "out": (9, TRUNK, 0.0), "norm": (10, 0.0, 1.0), "logits": (10, 1.45, 3.0),
}  # fmt: skip
# From, to, and what happens on the way.
LINES = [
    ("tokens", "tok_embeddings", "look up"),
    ("tok_embeddings", "attention_norm", "norm"),
    ("attention_norm", "attention.q", "× wq"), ("attention_norm", "attention.k", "× wk"),
    ("attention_norm", "attention.v", "× wv"),
    ("attention.q", "attention.q_rotated", "rotate"), ("attention.k", "attention.k_rotated", "rotate"),
    ("attention.q_rotated", "attention.scores", ""),
    ("attention.k_rotated", "attention.scores", "q · k / √E + mask"),
    ("attention.scores", "attention.probs", "softmax"),
    ("attention.probs", "attention.heads", "× v"), ("attention.v", "attention.heads", ""),
    ("attention.heads", "attention.out", "side by side, × wo"),
    ("attention.out", "after_attention", "+"),
    ("tok_embeddings", "after_attention", ""),
    ("after_attention", "ffn_norm", "norm"),
    ("ffn_norm", "feed_forward.gate", "silu(× w1)"), ("ffn_norm", "feed_forward.up", "× w3"),
    ("feed_forward.gate", "feed_forward.hidden", "gate · up"),
    ("feed_forward.up", "feed_forward.hidden", ""),
    ("feed_forward.hidden", "feed_forward.out", "× w2"),
    ("feed_forward.out", "out", "+"), ("after_attention", "out", ""),
    ("out", "norm", "norm"), ("norm", "logits", "× output"),
]  # fmt: skip
NOTES = {
    1: ("Attention:", "what should each token read", "from the ones before it?"),
    6: ("Feed-forward:", "what does each token make", "of what it read?"),
}


Box = namedtuple("Box", "row trunk x y w")  # where a tensor stands


def boxes() -> dict[str, Box]:
    left = PAD + TRUNK_WIDE + LANE
    third = (WIDE - PAD - left + 14) / 3
    found = {}
    for part, (row, a, b) in PLACES.items():
        y = 36 + row * (BOX + GAP) + (STRIP + 14) * (row > 0) - 6 * (row > 9)
        trunk = a == TRUNK
        x, w = (PAD, TRUNK_WIDE) if trunk else (left + a * third, (b - a) * third - 14)
        found[part] = Box(row, trunk, x, y, w)
    return found


def steps_of(
    weights: llama.Weights, params: llama.Params, tokens: Tensor
) -> dict[str, tuple[str, Tensor]]:
    """Letters and tensor of every step of a pass, by name; of layers only the first."""
    found: dict[str, tuple[str, Tensor]] = {}

    def probe(name: str, dims: str, tensor: Tensor) -> Tensor:
        found.setdefault(name.removeprefix("layers.0."), (dims, tensor))
        return tensor

    llama.forward(tokens, weights, params, probe=probe)
    return found


def glimpse(part: str, tensor: Tensor) -> list[list[str]]:
    """The colours of a tensor's first numbers (across) for the first tokens (down), in head 0."""
    values = tensor[0]
    if values.dim() == 3:
        values = values[0]
    if values.dim() < 2:
        return []
    values = values[:FEW, :FEW].float()
    fills = share_fills(values, 0.5) if part.endswith("probs") else score_fills(values)
    rows, columns = values.shape
    return [[fills.get((r, c), "h0") for c in range(columns)] for r in range(rows)]


def arrow(x: float, y: float, way: str) -> str:
    return {"down": f"M{x - 4:.1f} {y - 6:.1f}l4 6l4 -6", "right": f"M{x - 6:.1f} {y - 4:.1f}l6 4l-6 4",
            "left": f"M{x + 6:.1f} {y - 4:.1f}l-6 4l6 4"}[way]  # fmt: skip


def way(a: Box, b: Box, axis: float) -> tuple[str, float, float]:
    """A line from box to box, and where its words stand."""
    if b.trunk and a.row < b.row or (b.trunk and not a.trunk):
        y = a.y + BOX / 2
        end = b.x + b.w if a.row == b.row else axis + 10
        return f"M{a.x:.1f} {y:.1f}H{end:.1f}" + arrow(end, y, "left"), (a.x + end) / 2, y
    if a.row == b.row and not a.trunk:
        right = a.x < b.x
        x1, x2 = (a.x + a.w, b.x) if right else (a.x, b.x + b.w)
        y = a.y + BOX / 2
        return (
            f"M{x1:.1f} {y:.1f}H{x2:.1f}" + arrow(x2, y, "right" if right else "left"),
            (x1 + x2) / 2,
            y,
        )
    if a.trunk:
        y = b.y + BOX / 2
        return (
            f"M{axis:.1f} {y:.1f}H{b.x:.1f}" + arrow(b.x, y, "right"),
            (a.x + a.w + b.x) / 2 - 4,
            y,
        )
    if b.row - a.row > 1:
        x = a.x + a.w - 12
        return f"M{x:.1f} {a.y + BOX:.1f}V{b.y:.1f}" + arrow(x, b.y, "down"), x, b.y
    x1, x2 = a.x + a.w / 2, b.x + b.w / 2
    x1 = min(max(x1, b.x + 14), a.x + a.w - 14)
    y1, y2 = a.y + BOX, b.y
    bends = f"{x1:.1f} {y1 + GAP * 0.8:.1f} {x2:.1f} {y2 - GAP * 0.8:.1f}"
    curve = f"M{x1:.1f} {y1:.1f}C{bends} {x2:.1f} {y2:.1f}"
    return curve + arrow(x2, y2, "down"), x2, (y1 + y2) / 2


def words_on(x: float, y: float, words: str) -> list[str]:
    wide = 6.3 * len(words) + 8
    return [
        rect(x - wide / 2, y - 8, wide, 16, "paper", 4),
        text(x, y + 4, words, "faint", 11.5, "middle"),
    ]


def the_map(name: str, weights: llama.Weights, params: llama.Params, tokens: Tensor) -> None:
    """Draws the pass over these tokens."""
    found, places, L = steps_of(weights, params, tokens), boxes(), params["n_layers"]
    if {*places} != {*found} - {name for name in found if name.startswith("layers.")}:
        raise ValueError(f"the map has other steps than forward: {sorted({*places} ^ {*found})}")
    axis = PAD + TRUNK_WIDE / 2
    left = PAD + TRUNK_WIDE + LANE
    body: list[str] = []
    for first, last in ((1, 5), (6, 8)):
        y = places["attention_norm" if first == 1 else "ffn_norm"].y - 12
        low = max(box.y for box in places.values() if box.row == last) + BOX + 12
        body += [
            rect(left - 12, y, WIDE - left + 8, low - y, "side", 9),
            frame(left - 12, y, WIDE - left + 8, low - y, rx=9),
        ]
    top, low = places["tok_embeddings"].y, places["out"].y
    strip = top + BOX + GAP / 2
    end = places["norm"].y + BOX / 2
    body.append(path(f"M{axis:.1f} {top + 10:.1f}V{end:.1f}", "stream", 9))
    body.append(
        text(
            axis - 14,
            places["attention.heads"].y - 20,
            "the residual stream",
            "faint",
            12.5,
            turned=True,
        )
    )
    if L > 1:
        said = f"then the same in the other {L - 1} layers, and at the end:"
        body.append(text(left, places["out"].y + BOX / 2 + 4, said, "faint", 12.5))
    for a, b, _ in LINES:
        if not (places[a].trunk and places[b].trunk):
            body.append(path(way(places[a], places[b], axis)[0], "faint", 1.4))
    for part, box in places.items():
        dims, tensor = found[part]
        shown = (
            part.replace("attention.", "").replace("feed_forward.", "")
            if not part.endswith(".out")
            else part
        )
        pieces: list[tuple[str, str]] = []
        for letter, size in zip(dims.split(), tensor.shape):
            pieces += [(letter, letter), (f" {size}  ", "faint")]
        pieces[-1] = (pieces[-1][0].rstrip(), "faint")
        squares = glimpse(part, tensor)
        room = box.w - (FEW * SQUARE + 6) * bool(squares)
        name_size = min(13.0, (room - 8) / len(shown) / 0.64)
        body += [
            rect(box.x, box.y, box.w, BOX, "paper", 7),
            frame(box.x, box.y, box.w, BOX, "faint", rx=7),
            text(box.x + room / 2, box.y + 16, shown, "ink", name_size, "middle", bold=True),
            letters(box.x + room / 2, box.y + 32, pieces, 11),
        ]
        if squares:
            w, h = (SQUARE * len(squares[0]), SQUARE * len(squares))
            x, y = box.x + box.w - w - 6, box.y + (BOX - h) / 2
            body += [tiny_squares(x, y, squares, SQUARE), frame(x, y, w, h)]
    for a, b, words in LINES:
        if not words:
            continue
        _, x, y = way(places[a], places[b], axis)
        if words == "+":
            body += [
                f'<circle class="f-paper s-faint" cx="{axis:g}" cy="{y:g}" r="9"/>',
                text(axis, y + 4.5, "+", "ink", 15, "middle", bold=True),
            ]
        else:
            body += words_on(x, y, words)
    for row, lines in NOTES.items():
        y = 36 + row * (BOX + GAP) + STRIP + 14
        x = left + (WIDE - PAD - left) / 3 + 14
        body.append(text(x, y + 16, lines[0], "ink", 13, bold=True))
        body.append(text(x, y + 33, " ".join(lines[1:]), "ink", 13))
    x = left - 12
    shown_layers = list(range(L)) if L <= 14 else [*range(6), -1, *range(L - 6, L)]
    body.append(text(x, strip + 18, "layer", "faint", 12))
    x += 42
    for i in shown_layers:
        if i < 0:
            body.append(text(x + 10, strip + 18, "…", "faint", 13, "middle"))
            x += 24
            continue
        body += [
            rect(x, strip + 2, 30, 22, "stream" if i == 0 else "paper", 5),
            frame(x, strip + 2, 30, 22, rx=5),
            text(x + 15, strip + 18, str(i), "ink", 12, "middle"),
        ]
        x += 36
    body.append(
        text(
            x + 8,
            strip + 18,
            "layer 0 is drawn below; the others are the same with other weights",
            "faint",
            12,
        )
    )
    legend = [
        ("T", "tokens"), ("S", "positions they see"), ("D", "model dim"), ("H", "query heads"),
        ("K", "key/value heads"), ("E", "head dim"), ("F", "units"), ("V", "vocabulary"), ("B", "batch"),
    ]  # fmt: skip
    pieces = []
    for letter, words in legend:
        pieces += [(letter, letter), (f" {words}   ", "faint")]
    body.append(letters(WIDE / 2, 20, pieces, 10.2))
    drawing.display(
        name,
        page("the map of a pass: one layer, tensor by tensor", body, places["norm"].y + BOX + 12),
    )
