"""Milliseconds a token: generation with stf's caches, beside recomputing, a dense cache in PyTorch, and the floor.

    python benchmarks/generate.py                       # this machine's rows, benchmarks/results/generate_<device>.json
    python benchmarks/generate.py --only=cifar10-small  # rows whose preset's name has the word
    python benchmarks/generate.py --growth              # the time of a token against the length, and its picture

Models are untrained: time does not depend on the weights. A row draws 64 tokens at a time behind its prefix; the
fastest of ten such calls counts (what else runs on the machine only adds), a token of the whole batch. First: until
the first token, compilation in it; prefill: the prefix again, compiled. Recompute: one pass over all positions,
compiled, which a token costs without a cache. Torch (of this Python, or of $STF_TORCH_PYTHON): the same model and
batch with dense attention over a whole cache, compiled, in a process of its own. Floor: all weights and what a step
reads of the caches, over the copy rate, which is measured first.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CALL, CALLS = 64, 10
PEER_SECONDS = 150  # most that the peer may take, with its compilation
CPU_ROWS = [
    *(("cifar10-small", batch, 0) for batch in (1, 8, 16, 64)),
    *(("cifar10-small", 8, prefix) for prefix in (0.5, 1)),
    *(("enwik8-small", batch, 0) for batch in (1, 16)),
    ("audio-small", 1, 0),
    ("imagenet64-small", 8, 0),
]
GPU_ROWS = [
    *(("cifar10", batch, 0) for batch in (1, 16, 64)),
    *(("cifar10", 16, prefix) for prefix in (0.5, 1)),
    *(("enwik8", batch, 0) for batch in (1, 16)),
    *(("enwik8", 16, prefix) for prefix in (0.5, 1)),
]
GROWTH = {
    "causal": lambda patterns, root: patterns.Causal(),
    "local, l = 128": lambda patterns, root: patterns.Local(128),
    "strided, l = root of n": lambda patterns, root: patterns.Strided(root),
}


def copy_rate(tf):
    """Bytes read and written in a second by a copy of an array larger than caches."""
    x = tf.zeros([2**27 if tf.config.list_physical_devices("GPU") else 2**25])
    copy = tf.function(lambda x: x + 1.0, jit_compile=True)
    copy(x)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        float(copy(x)[0])
        times.append(time.perf_counter() - begin)
    return 2 * 4 * int(x.shape[0]) / min(times)


def bytes_of_a_token(model, sampler):
    """What a step cannot but read: the weights in the dtype of products, and of each cache what the step asks for."""
    weights = sum(int(np.prod(w.shape)) for w in model.trainable_variables)
    read = 0
    for cache in sampler.decoder.caches:
        read += cache.layers * sum(cache.slots_read) * (cache.key_dim + cache.value_dim)
    size = sampler.decoder.cache_dtype.size
    return weights * size + read * len(sampler.tokens) * size


def measure(model, batch, begin, rate, recompute=True):
    """A row's numbers: `begin` tokens of prefix, `CALLS` calls of `CALL` tokens behind it as far as there is room."""
    from stf.generation import Sampler

    prefix = np.random.default_rng(0).integers(0, 256, (batch, begin)).astype("int32")

    def started():
        sampler = Sampler(model, prefix=prefix, seed=1)
        start = time.perf_counter()
        sampler.draw(1)
        return sampler, time.perf_counter() - start

    _, first = started()
    sampler, again = started()
    times = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        drawn = sampler.draw(CALL).shape[1]
        if drawn:
            times.append((time.perf_counter() - start) / drawn)
    ms = 1e3 * min(times)
    row = {
        "ms": ms,
        "tokens_per_s": 1e3 * batch / ms,
        "first_s": first,
        "prefill_ms": 1e3 * again,
        "cache_MB": sampler.cache_bytes / 1e6,
        "floor_ms": 1e3 * bytes_of_a_token(model, sampler) / rate,
    }
    if recompute:
        row["recompute_ms"] = recompute_ms(model, batch)
    return row


@functools.cache
def recompute_ms(model, batch):
    """Milliseconds of one pass over all positions, compiled."""
    import tensorflow as tf

    whole = tf.function(lambda x: model(x)[:, -1], jit_compile=True)
    tokens = tf.zeros([batch, model.length], tf.int32)
    whole(tokens)
    start = time.perf_counter()
    whole(tokens).numpy()
    return 1e3 * (time.perf_counter() - start)


@functools.cache
def torch_ms(preset, batch):
    """The peer's milliseconds a token, or None where it does not run. It looks at the whole cache wherever it is."""
    import stf

    config = stf.models.SparseTransformer.from_preset(preset).get_config()
    names = ("num_blocks", "num_heads", "model_dim", "key_dim", "value_dim", "ff_dim", "length")
    arguments = json.dumps({name: config[name] for name in names} | {"batch": batch, "begin": 0})
    peer = HERE / "peers" / "torch_generate.py"
    python = os.environ.get("STF_TORCH_PYTHON", sys.executable)
    # What leads TensorFlow to its libraries would lead PyTorch to them too.
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    try:
        done = subprocess.run(
            [python, str(peer), arguments], env=plain, capture_output=True, text=True, timeout=PEER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])["ms"] if done.returncode == 0 else None


def table(result, only, output):
    """Measures the rows and writes them, one after another."""
    import stf

    rate = result["copy_GB_s"] * 1e9
    policy = "mixed_bfloat16" if result["gpu"] else "float32"
    make = functools.cache(lambda preset: stf.models.SparseTransformer.from_preset(preset, dtype=policy))
    print(f"{'preset':18}{'batch':>6}{'prefix':>8}{'ms':>9}{'tokens/s':>10}{'floor':>8}{'recompute':>11}{'torch':>8}")
    for preset, batch, share in GPU_ROWS if result["gpu"] else CPU_ROWS:
        if only not in preset:
            continue
        model = make(preset)
        begin = min(int(share * model.length), model.length - CALL - 1)
        row = {"preset": preset, "batch": batch, "prefix": begin, "length": model.length}
        row |= measure(model, batch, begin, rate)
        row["torch_ms"] = torch_ms(preset, batch)
        result["rows"].append(row)
        peer = f"{row['torch_ms']:8.2f}" if row["torch_ms"] else "       -"
        print(
            f"{preset:18}{batch:6}{begin:8,}{row['ms']:9.3f}{row['tokens_per_s']:10,.0f}{row['floor_ms']:8.3f}"
            f"{row['recompute_ms']:11.1f}{peer}   first {row['first_s']:.1f} s, prefill {row['prefill_ms']:.1f} ms, "
            f"caches {row['cache_MB']:,.1f} MB",
            flush=True,
        )
        output.write_text(json.dumps(result, indent=1) + "\n")


def growth(result, output):
    """Milliseconds a token of two blocks of one pattern, at the end of sequences of 3,072 to 65,536 tokens."""
    import stf

    rate = result["copy_GB_s"] * 1e9
    for name, make in GROWTH.items():
        for length in (3072, 6144, 12288, 24576, 49152, 65536):
            pattern = make(stf.patterns, 2 ** round(np.log2(length) / 2))
            shape = (-(-length // 128), 128)
            model = stf.models.SparseTransformer(length, shape, [pattern], num_blocks=2, num_heads=4, model_dim=256)
            row = {"pattern": name, "length": length} | measure(model, 1, length - CALL * (CALLS + 2), rate, False)
            result["growth"].append(row)
            print(f"{name:26}{length:8,}{row['ms']:9.3f} ms{row['floor_ms']:9.3f} floor", flush=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, HERE.parent / "docs" / f"{output.stem}.svg")


def draw(result, path):
    """The milliseconds of a token against the length, one line a pattern."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name in GROWTH:
        rows = [row for row in result["growth"] if row["pattern"] == name]
        (line,) = axis.plot([row["length"] for row in rows], [row["ms"] for row in rows], "o-", label=name)
        axis.plot([row["length"] for row in rows], [row["floor_ms"] for row in rows], ":", color=line.get_color())
    axis.plot([], [], ":", color="gray", label="floor: bytes over copy rate")
    axis.set(xscale="log", yscale="log", xlabel="length of the sequence, tokens", ylabel="milliseconds a token")
    axis.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    axis.set_xticks([3072, 6144, 12288, 24576, 65536])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set_title(f"A token at the end of a sequence: two blocks, 4 heads, d 256, {result['device']}", fontsize=10)
    figure.savefig(path)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose preset's name contains this")
    parser.add_argument("--growth", action="store_true", help="measure the growth with the length in place of the rows")
    parser.add_argument("--draw", action="store_true", help="only draw what --output holds")
    parser.add_argument("--output", default="", help="where the JSON goes")
    options = parser.parse_args()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    device = (
        tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else f"{os.cpu_count()} CPU cores"
    )
    short = device.split()[1].lower() if gpus else "cpu"
    output = pathlib.Path(options.output or HERE / "results" / f"generate_{short}.json")
    result = {"rows": [], "growth": []}
    if output.exists():  # the other half of an earlier run stays
        result |= json.loads(output.read_text())
    if options.draw:
        return draw(result, HERE.parent / "docs" / f"{output.stem}.svg")
    result |= {
        "device": device,
        "gpu": bool(gpus),
        "processor": platform.processor(),
        "tensorflow": tf.__version__,
        "command": "python benchmarks/generate.py",
        "copy_GB_s": copy_rate(tf) / 1e9,
    }
    print(f"{device}: copy {result['copy_GB_s']:.1f} GB/s")
    if options.growth:
        growth(result | {"growth": []}, output)
    else:
        table(result | {"rows": []}, options.only, output)


if __name__ == "__main__":
    main()
