"""The longest context that trains, for models of 3M, 25M and 152M parameters (Table 4 of the paper).

    python benchmarks/long_context.py                            # benchmarks/results/long_context.json
    python benchmarks/long_context.py --models=3M --most=262144  # one model, up to a length
    python benchmarks/long_context.py --models=152M --gpus=1,2 --lengths=1048576,1310720,2490368
    python benchmarks/long_context.py --draw                     # the picture alone, of what was measured

On several GPUs each has some of the positions of every sequence (`stf.distribution.SequenceParallel`). Of the
first of those rows a step is profiled too; the bytes sent between GPUs stand beside what they come to by arithmetic.

The paper's models for 65,536 to 1,048,576 tokens of music (strided, l close to the root of the length) are run at
lengths that double, one sequence a step, everything recomputed, in mixed_bfloat16, each in a process of its own, until
one does not fit into the device's memory. Milliseconds and peak are those of `train_step.py`; both are drawn against
the length, with the exponent of the time's growth between the last two lengths that fill the device (this needs
matplotlib).
"""

import argparse
import itertools
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


def measure(preset, length, stride, gpus, profiled):
    """What a step of a preset at a length takes."""
    row = train_step.stf_row(preset, recompute=True, batch_size=1, length=length, stride=stride, gpus=gpus)
    called = train_step.__file__, "--row", json.dumps(row)
    found = train_step.run_child(*called, seconds=900) | {"length": length, "gpus": gpus}
    if gpus > 1 and "error" not in found:
        found["sent_GB_by_arithmetic"] = sent(train_step.make_config(row), gpus) / 1e9
        if profiled:
            profile = train_step.run_child(*called, "--profile", seconds=900)
            found["exchanges"] = profile.get("exchanges", [])
    return found


def sent(config, gpus):
    """Bytes that GPUs send each other in a step of Local and Strided in turn, one sequence, all recomputed, bfloat16.

    Of each pair of blocks the stream goes to the strided one's order and back, forward and as gradients, and there once
    more when it is computed again; the halo goes forward, again, and back as a gradient. Weights go to all but the
    first GPU, their gradients come back.
    """
    from stf.patterns.partition import Sizes, partition, positions_of_device

    patterns, heads, width, n = (config[name] for name in ("patterns", "num_heads", "model_dim", "length"))
    chunk = positions_of_device(patterns, heads, n, gpus)
    sizes = Sizes(chunk, gpus, width, heads, width // heads, width // heads)
    local, strided = (partition(pattern, heads, n, chunk, gpus).sent(sizes) for pattern in patterns)
    of_pairs = config["num_blocks"] // 2 * (3 * local + 5 * strided // 2)
    kernels = 12 * width * width  # key and value depths are model_dim / num_heads
    biases = 4 * width + 4 * width + width  # in float32; gradients of both as they were sent
    of_weights = 2 * (gpus - 1) * config["num_blocks"] * (2 * kernels + 4 * biases)
    return 2 * of_pairs + of_weights


def longest(preset, lengths, stride, gpus):
    """Rows of a preset at lengths that rise, to the first that does not run."""
    rows = []
    for length in lengths:
        rows.append(measure(preset, length, stride or stride_of(length), gpus, profiled=not rows))
        print(line(preset, rows[-1]), flush=True)
        yield rows
        if "error" in rows[-1]:
            return


def line(preset, row):
    """A row of the table."""
    if "error" in row:
        return f"{preset:12s}{row['gpus']:3d}{row['length']:12,}  {row['error'][:90]}"
    start = f"{preset:12s}{row['gpus']:3d}{row['length']:12,}{row['parameters']:14,}{row['ms']:12.1f}"
    parts = [f"{start}{row['peak_GiB']:9.2f} GiB{row['tokens_per_s']:12,.0f} tokens/s"]
    if row["gpus"] > 1:
        parts.append(f"sent {row['sent_GB']:.2f} GB, by arithmetic {row['sent_GB_by_arithmetic']:.2f}")
    parts += [f"{gpu['not_computing']:.1%} not computing" for gpu in row.get("exchanges", ())]
    return "  ".join(parts)


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
        ran = [row for row in rows if "ms" in row and row.get("gpus", 1) == 1]
        if not ran:
            continue
        lengths, growth = [row["length"] for row in ran], exponent(ran)
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
    parser.add_argument("--lengths", default="", help="these, rising, in place of those that double")
    parser.add_argument("--stride", type=int, help="of all lengths; the power of two closest to the root of each")
    parser.add_argument("--gpus", default="1", help="how many share a sequence: one number or several, such as 1,2")
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
    lengths = [options.least << k for k in range(64) if options.least << k <= options.most]
    lengths = [int(length) for length in options.lengths.split(",")] if options.lengths else lengths
    for name, gpus in itertools.product(options.models.split(","), map(int, options.gpus.split(","))):
        before = result["models"].get(name, [])
        for rows in longest(MODELS[name], lengths, options.stride, gpus):
            result["models"][name] = before + rows
            output.write_text(json.dumps(result, indent=1) + "\n")  # after every row
    print(f"written: {output}; --draw makes the picture")


if __name__ == "__main__":
    main()
