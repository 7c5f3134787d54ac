"""Draws what paper.py has measured: validation of all rows against minutes and against steps.

    python benchmarks/paper_plot.py                     # docs/paper_*.svg of each benchmarks/results/paper_*.json
    python benchmarks/paper_plot.py results.json a.svg  # one file

Needs matplotlib.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
COLORS = {
    "strided": "#0b6e99", "fixed": "#e07b39", "dense": "#6b6b6b", "local": "#7a9a3a", "augmented": "#a04060",
    "windows": "#8060b0", "small": "#0b6e99", "small_augmented": "#a04060",
}  # fmt: skip
POLICIES = {  # colour, line, width: lines that lie on one another stay to be seen
    "float32": ("#c0c0c0", "-", 5),
    "mixed_bfloat16": ("#0b6e99", "-", 1.6),
    "mixed_float16": ("#e07b39", "--", 1.2),
}


def style(name):
    """(colour, line, width) of a row, which is named after its pattern and, maybe, its policy."""
    pattern, _, rest = name.partition("-")
    return POLICIES.get(rest, (COLORS.get(pattern, "#a04060"), "-", 1.6))


def draw(source, target):
    """One picture of one file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(pathlib.Path(source).read_text())
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
    low, high = float("inf"), 0
    for row in result["rows"]:
        points = row["points"]
        bits = [point["validation"] for point in points]
        lowest = min(points, key=lambda point: point["validation"])
        color, line, width = style(row["row"])
        low, high = min(low, *bits), max(high, bits[len(bits) // 8])
        for axis, key, unit in ((axes[0], "seconds", 60), (axes[1], "step", 1)):
            axis.plot(
                [point[key] / unit for point in points],
                bits,
                line,
                color=color,
                lw=width,
                label=row["row"],
                zorder=9 - width,
            )
            axis.plot(lowest[key] / unit, lowest["validation"], "o", color=color, ms=4)
    for name, bits in result["packed"].items():
        if low < bits < high + 0.5:
            for axis in axes:
                axis.axhline(bits, color="#b0b0b0", lw=0.8, zorder=0)
            axes[1].annotate(
                f"{name}, of the test split", (1, bits), (-4, 3), xycoords=("axes fraction", "data"), ha="right",
                textcoords="offset points", fontsize=8, color="#707070",
            )  # fmt: skip
            high = max(high, bits)
    axes[0].set(xlabel="minutes of training", ylabel="validation, bits a byte", ylim=(low - 0.05, high + 0.1))
    axes[1].set(xlabel="steps")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.set_xlim(0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    blocks, machines = ({row[name] for row in result["rows"]} for name in ("num_blocks", "machine"))
    figure.suptitle(
        f"{result['data']}; {', '.join(map(str, sorted(blocks)))} blocks, {', '.join(machines)}; dots: the lowest",
        fontsize=9,
    )
    figure.savefig(target)
    pyplot.close(figure)
    print(f"written: {target}")


def main():
    if len(sys.argv) == 3:
        draw(*sys.argv[1:])
        return
    for source in sorted((HERE / "results").glob("paper_*.json")):
        draw(source, HERE.parent / "docs" / f"{source.stem}.svg")


if __name__ == "__main__":
    main()
