"""Draws docs/patterns.svg: what each query attends to, in the patterns that stf is made for.

    python benchmarks/patterns_plot.py

As the paper's Figure 3, at 64 positions, an image of 8 x 8: above, the pixels that a query reads; below, the matrix of
all queries (down) and keys (across). Under each, its share of causal attention's pairs at the paper's 12,288 positions.
Needs matplotlib.
"""

import pathlib

import numpy as np

from stf.patterns import Causal, Fixed, Local, OwnBlock, Strided, Summary

SIDE = 8
QUERY = 43  # of the small pictures
LENGTH = 12288
COLORS = {"first": "#0b6e99", "second": "#e07b39", "query": "#1d1d22", "later": "#e4e4e8", "left out": "#fbfbfc"}
PANELS = [
    # Title, the two parts that are told apart by colour at the small size, and the pattern at the paper's.
    ("causal (dense)", (Causal(),), Causal()),
    ("local", (Local(SIDE),), Local(128)),
    ("strided", (Strided(SIDE),), Strided(128)),
    ("local | strided", (Local(SIDE), Strided(SIDE)), Local(128) | Strided(128)),
    ("fixed: own block | summary", (OwnBlock(SIDE), Summary(SIDE, 2)), Fixed(128, 32)),
]


def colours(parts):
    """The matrix [query, key, rgb] of a pattern's parts."""
    from matplotlib.colors import to_rgb

    n = SIDE * SIDE
    picture = np.empty((n, n, 3))
    picture[:] = to_rgb(COLORS["left out"])
    picture[np.triu_indices(n, 1)] = to_rgb(COLORS["later"])
    for part, name in reversed(list(zip(parts, ("first", "second"), strict=False))):
        picture[part.mask(n, 0)] = to_rgb(COLORS[name])
    picture[np.diag_indices(n)] = to_rgb(COLORS["query"])
    return picture


def draw(target):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(PANELS), figsize=(12.5, 4.6), height_ratios=[0.42, 1], layout="constrained", facecolor="white"
    )
    for (title, parts, full), above, below in zip(PANELS, *axes, strict=True):
        matrix = colours(parts)
        above.imshow(matrix[QUERY].reshape(SIDE, SIDE, 3))
        for axis, spacing in ((above, 1), (below, SIDE)):
            side = SIDE if axis is above else SIDE * SIDE
            axis.set_xticks(np.arange(0, side + 1, spacing) - 0.5, [])
            axis.set_yticks(np.arange(0, side + 1, spacing) - 0.5, [])
            axis.grid(color="#c9c9d0", lw=0.4)
            axis.tick_params(length=0)
        below.imshow(matrix, interpolation="nearest")
        share = full.pairs(LENGTH) / Causal().pairs(LENGTH)
        above.set_title(title, fontsize=11)
        below.set_xlabel(
            f"{100 * share:.1f}% of the pairs\nat n = {LENGTH:,}" if share < 1 else "all pairs", fontsize=10
        )
    axes[0, 0].set_ylabel("one query,\non the image", fontsize=9)
    axes[1, 0].set_ylabel("queries", fontsize=9)
    figure.savefig(target)
    print(f"written: {target}")


if __name__ == "__main__":
    draw(pathlib.Path(__file__).resolve().parents[1] / "docs" / "patterns.svg")
