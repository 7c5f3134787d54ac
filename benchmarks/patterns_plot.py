"""Draws docs/patterns.svg, what each query attends to in the patterns that stf is made for, and the guides' pictures.

    python benchmarks/patterns_plot.py

As the paper's Figure 3, at 64 positions, an image of 8 x 8: above, the pixels that a query reads; below, the matrix of
all queries (down) and keys (across). Under each, its share of causal attention's pairs at the paper's 12,288 positions.
Needs matplotlib.
"""

import pathlib

import numpy as np

from stf.patterns import Blocks, Causal, Fixed, Local, OwnBlock, Sink, Strided, Summary, Window

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


def matrix(axis, title, parts, mask=None):
    """One matrix of a guide: the parts' keys by colour, less what a mask leaves out."""
    picture = colours(parts)
    if mask is not None:
        from matplotlib.colors import to_rgb

        picture[np.tril(~mask)] = to_rgb(COLORS["left out"])
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("keys", fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def restarted(pattern, lengths):
    """A pattern's mask counted from each document's first position on."""
    mask, begin = np.zeros((SIDE * SIDE, SIDE * SIDE), bool), 0
    for length in lengths:
        mask[begin : begin + length, begin : begin + length] = pattern.mask(length)
        begin += length
    return mask


class Given(Causal):
    """A mask as a part that `colours` draws."""

    def __init__(self, mask):
        self.given = mask

    def mask(self, n, head=0):
        """The mask."""
        return self.given


def draw_guides(folder):
    from matplotlib import pyplot

    lengths = (20, 29, 15)
    ids = np.repeat(np.arange(len(lengths)), lengths)
    same = ids[:, None] == ids[None, :]
    block, columns = OwnBlock(SIDE), Summary(SIDE, 2)
    both = [Given(restarted(part, lengths)) for part in (block, columns)]
    pages = {
        "documents.svg": [
            ("fixed attention, one document", (block, columns), None),
            ("three documents", (block, columns), same),
            ("three documents, restart=True", both, None),
        ],
        "sinks.svg": [
            ("Window(12)", (Window(12),), None),
            ("Window(12) | Sink(4)", (Window(12), Sink(4)), None),
        ],
        "own_pattern.svg": [
            (
                "blocks at distances of powers of two",
                (Blocks.from_rule(lambda r, c: (r - c) & (r - c - 1) == 0, SIDE * SIDE, 4),),
                None,
            ),
        ],
    }
    for name, panels in pages.items():
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(3.4 * len(panels), 3.7), layout="constrained", facecolor="white", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            matrix(axis, *panel)
        axes[0, 0].set_ylabel("queries", fontsize=9)
        figure.savefig(folder / name)
        print(f"written: {folder / name}")


if __name__ == "__main__":
    docs = pathlib.Path(__file__).resolve().parents[1] / "docs"
    draw(docs / "patterns.svg")
    draw_guides(docs)
