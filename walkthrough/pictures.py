"""The pictures of walkthrough.md. Each function draws one figure, named for the file that build.py writes.

What is drawn is rounded first, so that the same numbers up to their last bits give the same picture.
"""

import matplotlib.pyplot as plt
import torch

WIDTH = 8.6  # inches of 72 points: what GitHub shows without shrinking it


def label(word, most=13):
    """A token as it is written at an axis: a dot for a space, no line breaks, not too long."""
    word = repr(word)[1:-1].replace(" ", "·").replace("<|begin_of_text|>", "begin")
    word = word if len(word) <= most else word[: most - 1] + "…"
    return word.replace("$", r"\$")


def squares(ax, shares, depth=1.0, levels=20):
    """Shares of 0 to 1 as squares, from nothing to blue; the first row is on top."""
    ax.pcolormesh((shares.float() * levels).round().numpy() / levels * depth, vmin=0, vmax=1)
    ax.invert_yaxis()


def attention(name, maps, titles, words):
    """Who looks (rows) at whom (columns), in one head or in several beside each other."""
    several, words = len(maps) > 1, [label(word) for word in words]
    rows = -(-len(maps) // 4)
    figure = (WIDTH, 1.1 + 2.2 * rows) if several else (6, 5.6)
    _, axes = plt.subplots(rows, min(len(maps), 4), figsize=figure, num=name, squeeze=False)
    for ax in axes.flat[len(maps) :]:
        ax.axis("off")
    places = [n + 0.5 for n in range(len(words))]
    for n, (ax, shares, title) in enumerate(zip(axes.flat, maps, titles)):
        squares(ax, shares, levels=10 if several else 20)
        ax.set(title=title, aspect="equal")
        bare = n + 4 < len(maps)  # only the lowest row of several has its tokens named
        size = 7 if several else 10
        ax.set_xticks([] if bare else places, [] if bare else words, rotation=90, fontsize=size)
        ax.set_yticks([] if n % 4 else places, [] if n % 4 else words, fontsize=size)
        ax.tick_params(length=0)
        ax.set_xlabel("looked at")
        ax.set_ylabel("" if n % 4 else "looks")


def turning(name, turns, degrees):
    """An arrow to the right as some pairs turn it: turns (positions, pairs) of length 1."""
    pairs = min(4, turns.shape[1])
    _, axes = plt.subplots(1, pairs, figsize=(WIDTH, 2.5), num=name)
    angles = torch.linspace(0, 6.2832, 61)
    for n, ax in enumerate(axes):
        ax.plot(
            angles.cos().numpy().round(3), angles.sin().numpy().round(3), alpha=0.4, linewidth=1
        )
        for position, (right, up) in enumerate(torch.view_as_real(turns[:, n]).numpy().round(3)):
            ax.plot([0, right], [0, up], color="C1", alpha=0.6, linewidth=1)
            if degrees[n] > 8 or position in (
                0,
                len(turns) - 1,
            ):  # else they would lie on each other
                ax.text(1.2 * right, 1.2 * up, position, ha="center", va="center", fontsize=10)
        ax.set(
            xlim=(-1.4, 1.4),
            ylim=(-1.4, 1.4),
            aspect="equal",
            title=f"pair {n}: {degrees[n]:.3g}° a position",
        )
        ax.axis("off")


def curves(name, x, ys, height=2.8, marks="-", ticks=None, levels=(), **axes):
    """Lines over x, ys by their names. ticks: texts by place. levels: dashed lines, names by height."""
    _, ax = plt.subplots(figsize=(WIDTH, height), num=name)
    for title, y in ys.items():
        ax.plot(
            x,
            [float(f"{value:.3g}") for value in y],
            marks,
            linewidth=1.5,
            markersize=5,
            label=title,
        )
    ax.set(**axes)
    if ticks:
        ax.set_xticks(list(ticks), list(ticks.values()))
        ax.minorticks_off()
    for level, words in dict(levels).items():
        ax.axhline(level, color="C4", linewidth=1, linestyle="--")
        ax.text(x[0], level * 1.1, words, color="C4", va="bottom")
    if len(ys) > 1:
        ax.legend()
    ax.grid()


def gate(name, z, gates, parts, words, title):
    """Where tokens fall on the curve of the gate, z to gates, and parts of a unit by name, for each token."""
    _, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), num=name, width_ratios=(1, 2.4))
    reach = max(4, round(z.abs().max().item() + 0.5))
    line = torch.linspace(-reach, reach, 81)
    left.plot(line.numpy(), torch.nn.functional.silu(line).numpy().round(2))
    left.plot(z.numpy().round(2), gates.numpy().round(2), "o", color="C1", markersize=5, alpha=0.7)
    left.set(xlabel="z = w1 · h", title="gate = SiLU(z)")
    left.grid()
    for n, (part, values) in enumerate(parts.items()):
        places = [m + 0.27 * (n - 1) for m in range(len(words))]
        right.bar(places, values.numpy().round(2), 0.27, color=f"C{n + 1}", label=part)
    right.set_xticks(range(len(words)), [label(word) for word in words], rotation=90)
    right.set_title(title)
    right.legend(ncols=3)
    right.grid(axis="y")


def lens(name, words, probs, layers, after):
    """The likeliest next token (words and probs, by token and layer) after each of these layers."""
    _, ax = plt.subplots(figsize=(WIDTH, 0.32 * len(after) + 1), num=name)
    squares(ax, probs, 0.15)
    few = len(layers) < 6
    for row, line in enumerate(words):
        for column, word in enumerate(line):
            ax.text(column + 0.5, row + 0.5, label(word, 20 if few else 10), ha="center", va="center",
                    fontsize=10 if few else 8)  # fmt: skip
    ax.set_xticks(
        [n + 0.5 for n in range(len(layers))], [f"after layer {i}" if few else i for i in layers]
    )
    ax.set_yticks([n + 0.5 for n in range(len(after))], [label(word) for word in after])
    ax.set(
        ylabel="after the token",
        title="the likeliest next token, were this the last layer; bluer is surer",
    )


def distributions(name, panels, words):
    """Probabilities of the same tokens, a panel for each of panels (title to probabilities)."""
    _, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), num=name, sharey=True)
    for ax, (title, p) in zip(axes, panels.items()):
        ax.barh(range(len(words)), p.numpy().round(2))
        ax.set(title=title, xlim=(0, 1.2), xlabel="probability")
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        ax.set_yticks(range(len(words)), [label(word) for word in words])
        for n, share in enumerate(p.tolist()):
            if share >= 0.005:
                ax.text(round(share, 2) + 0.04, n, f"{share:.0%}", va="center", fontsize=10)
    axes[0].invert_yaxis()


def grid(name, shares, rows, columns, **axes):
    """Shares of 0 to 1 in a grid, each written into its square."""
    _, ax = plt.subplots(figsize=(WIDTH, 0.8 + 0.36 * len(rows)), num=name)
    squares(ax, shares, 0.15)
    for row, line in enumerate(shares.tolist()):
        for column, share in enumerate(line):
            size = 10 if len(columns) < 17 else 7
            ax.text(
                column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=size
            )
    ax.set_xticks([n + 0.5 for n in range(len(columns))], columns)
    ax.set_yticks([n + 0.5 for n in range(len(rows))], rows)
    ax.tick_params(length=0)
    ax.set(**axes)
