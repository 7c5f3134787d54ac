"""The longest context that trains on one GPU, for models of 3M, 25M and 152M parameters (Table 4 of the paper).

    python benchmarks/long_context.py                            # benchmarks/results/long_context.json
    python benchmarks/long_context.py --models=3M --most=262144  # one model, up to a length
    python benchmarks/long_context.py --draw                     # the picture alone, of what was measured

The paper's models for 65,536 to 1,048,576 tokens of music (strided, l close to the root of the length) are run at
lengths that double, one sequence a step, everything recomputed, in mixed_bfloat16, each in a process of its own, until
one does not fit into the device's memory. Milliseconds and peak are those of `train_step.py`; both are drawn against
the length, with the exponent of the time's growth between the last two lengths that fill the device (this needs
matplotlib).
"""

import argparse
import json
import math
import pathlib
import sys

import train_step

HERE = pathlib.Path(__file__).resolve().parent
MODELS = {"3M": "audio-1m", "25M": "audio-262k", "152M": "audio-65k"}


def stride_of(length):
    """The power of two closest to the root of a length."""
    return 2 ** round(math.log2(length) / 2)


def measure(preset, length):
    """What a step of a preset at a length takes."""
    row = train_step.stf_row(preset, recompute=True, batch_size=1, length=length, stride=stride_of(length))
    return train_step.run_child(train_step.__file__, "--row", json.dumps(row), seconds=900) | {"length": length}


def longest(preset, length, most):
    """Rows of a preset at lengths that double, to the first that does not run."""
    rows = []
    while length <= most:
        rows.append(measure(preset, length))
        print(line(preset, rows[-1]), flush=True)
        yield rows
        if "error" in rows[-1]:
            return
        length *= 2


def line(preset, row):
    """A row of the table."""
    if "error" in row:
        return f"{preset:12s}{row['length']:12,}  {row['error'][:90]}"
    return (
        f"{preset:12s}{row['length']:12,}{row['parameters']:14,}{row['ms']:12.1f}{row['peak_GiB']:9.2f} GiB"
        f"{row['tokens_per_s']:12,.0f} tokens/s"
    )


def exponent(rows):
    """k of milliseconds ~ length^k, between the last two rows that ran; None where there are fewer."""
    rows = [row for row in rows if "ms" in row][-2:]
    if len(rows) < 2:
        return None
    return math.log(rows[1]["ms"] / rows[0]["ms"]) / math.log(rows[1]["length"] / rows[0]["length"])


def draw(result, path):
    """Milliseconds and GiB of a step against the length, one line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, rows in result["models"].items():
        ran = [row for row in rows if "ms" in row]
        if not ran:
            continue
        lengths, growth = [row["length"] for row in ran], exponent(rows)
        label = f"{name} parameters" + (f", $n^{{{growth:.2f}}}$" if growth else "")
        axes[0].plot(lengths, [row["ms"] for row in ran], "o-", label=label)
        axes[1].plot(lengths, [row["peak_GiB"] for row in ran], "o-", label=f"{name} parameters")
    for axis, name in zip(axes, ("milliseconds a step", "peak memory, GiB"), strict=True):
        axis.set(yscale="log", xlabel="context, in 1,024 tokens", ylabel=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:,.0f}")
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(lambda y, _: f"{y:,g}" if f"{y:e}"[0] in "1235" else "")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"One sequence a step, everything recomputed, bfloat16, on one {result['device']}")
    figure.savefig(path)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="which, of 3M, 25M and 152M")
    parser.add_argument("--least", type=int, default=2**14, help="no shorter than this")
    parser.add_argument("--most", type=int, default=2**22, help="no longer than this")
    parser.add_argument("--output", default=str(HERE / "results" / "long_context.json"))
    parser.add_argument("--draw", action="store_true", help="only draw what --output holds")
    options = parser.parse_args()
    output = pathlib.Path(options.output)
    if options.draw:
        return draw(json.loads(output.read_text()), HERE.parent / "docs" / f"{output.stem}.svg")
    rates = train_step.run_child(train_step.__file__, "--rates")
    if "error" in rates:
        sys.exit(f"no rates: {rates['error']}")
    result = rates | {"command": train_step.command_line(), "models": {}}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        for rows in longest(MODELS[name], options.least, options.most):
            result["models"][name] = rows
            output.write_text(json.dumps(result, indent=1) + "\n")  # after every row
    print(f"written: {output}; --draw makes the picture")


if __name__ == "__main__":
    main()
