"""Draws what attention_gpu.py has measured: every row's share of its floor, ours beside the peers.

    python benchmarks/attention_plot.py                       # docs/attention_h100.svg
    python benchmarks/attention_plot.py a.svg a.json b.json   # to another file, of others

A peer that the first file lacks is taken from the next. Needs matplotlib.
"""

import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
NAMES = {
    "stf": "stf",
    "stf before": "stf before",
    "sdpa transposed": "SDPA on the transposed sequence",
    "flex attention": "FlexAttention",
    "sdpa dense cudnn": "SDPA, dense causal, cuDNN",
    "sdpa dense flash": "SDPA, dense causal, flash",
}
COLORS = ["#0b6e99", "#9ccbdc", "#e07b39", "#b5a642", "#8a8a8a", "#c2c2c2"]


def label(row):
    """A row in words: n, the depths, the pattern."""
    _, _, n, key_depth, value_depth = row["shape"]
    pattern = re.sub(r"\b(?:window|stride|summary|sub_block)=", "", row["pattern"])
    pattern = re.sub(r", None\)", ")", pattern)
    depth = f"{key_depth}" if key_depth == value_depth else f"{key_depth}, {value_depth}"
    return f"{pattern}\nn = {n:,}, depth {depth}"


def read(sources):
    """The first file's results, with rows of further implementations from the others."""
    results = [json.loads(pathlib.Path(source).read_text()) for source in sources]
    rows = []
    for result in results:
        known = {row["implementation"] for row in rows}
        rows += [row for row in result["rows"] if row["implementation"] not in known]
    return results[0]["machine"], [row for row in rows if row["dtype"] == "torch.bfloat16"]


def draw(sources, target):
    import matplotlib.patches

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machine, rows = read(sources)
    cases = list(dict.fromkeys((tuple(row["shape"]), row["pattern"]) for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.62 * len(cases) + 1.4), sharey=True, layout="constrained")
    for axis, which in zip(axes, ("forward", "forward+backward"), strict=True):
        for place, case in enumerate(cases):
            found = {
                row["implementation"]: row["share"]
                for row in rows
                if (tuple(row["shape"]), row["pattern"]) == case and row["pass"] == which
            }
            present = [name for name in NAMES if name in found]
            height = 0.84 / max(len(present), 1)
            for index, name in enumerate(present):
                y = place - 0.42 + (index + 0.5) * height
                color = COLORS[list(NAMES).index(name)]
                axis.barh(y, found[name], 0.92 * height, color=color)
                if name == "stf":
                    axis.text(found[name] + 0.01, y, f"{found[name]:.2f}", va="center", fontsize=7)
        axis.set_xlim(0, 1)
        axis.set_title(which.replace("+", " and "), fontsize=10)
        axis.set_xlabel("share of the floor (1: the matrix units or the memory do no better)", fontsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(cases)), [label({"shape": shape, "pattern": p}) for shape, p in cases], fontsize=8)
    axes[0].invert_yaxis()

    used = {row["implementation"] for row in rows}
    labels = [NAMES[name] for name in NAMES if name in used]
    patches = [matplotlib.patches.Patch(color=COLORS[list(NAMES).index(name)]) for name in NAMES if name in used]
    figure.legend(patches, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"Attention in bfloat16 on one {machine}", fontsize=10)
    figure.savefig(target, dpi=150, metadata={"Date": None})


def main():
    target, *sources = sys.argv[1:] or [
        HERE.parent / "docs" / "attention_h100.svg",
        HERE / "results" / "attention_h100.json",
        HERE / "results" / "attention_h100_flex.json",
    ]
    draw(sources, target)
    print(f"written: {target}")


if __name__ == "__main__":
    main()
