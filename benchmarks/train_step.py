"""A training step of the paper's models on one GPU, beside PyTorch's and beside its floor, all measured in one run.

    python benchmarks/train_step.py                             # the table, and benchmarks/results/train_step.json
    python benchmarks/train_step.py --only=cifar10 --peers=     # rows whose name has the word, ours alone

Each row runs in a process of its own: `compile` and a training step as `fit` runs it, on random tokens, with clipping,
AdamW, its moving average and the metric, in mixed_bfloat16. First call: from the call of the first step to its loss.
Milliseconds: the median of six groups of four steps, each group waited for once (of three steps where one takes more
than half a second). Peak: TensorFlow's own statistics of the steps after the first. Floor: `step_floor.py`, with the
rates measured first. Busy: time in which the GPU runs anything, from a profile of two steps (without command buffers,
which hide kernels), over the time of a step (with them). Peers: `peers/torch_transformer.py`, the same model in
PyTorch, each block compiled, with fused AdamW.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
STRIDE = 96  # of the CIFAR-10 preset


def stf_row(preset, blocks=None, recompute=True, batch_size=16, length=None, stride=None, name=None, gpus=1):
    """A row of ours: a preset, with what differs from it; at another length the strided pattern has a stride.

    Of several GPUs each has some of the positions of every sequence.
    """
    row = dict(side="stf", name=name or preset, preset=preset, blocks=blocks, recompute=recompute)
    return row | {"batch_size": batch_size, "length": length, "stride": stride, "gpus": gpus}


def torch_row(kind, model="cifar10", blocks=None, recompute=False, batch_size=16, length=None, name=None):
    """A row of the peer's."""
    return dict(side="torch", kind=kind, model=model, blocks=blocks, recompute=recompute, batch_size=batch_size) | {
        "length": length,
        "name": name or model,
    }


ROWS = [
    stf_row("cifar10", name="cifar10 strided"),
    stf_row("cifar10", recompute="attention", name="cifar10 strided"),
    stf_row("cifar10", recompute=False, name="cifar10 strided"),
    torch_row("strided", name="cifar10 strided"),
    torch_row("dense", name="cifar10 dense"),
    stf_row("cifar10-dense", name="cifar10 dense"),
    stf_row("cifar10-fixed", name="cifar10 fixed"),
    stf_row("cifar10", blocks=16, name="cifar10 strided"),
    stf_row("cifar10", blocks=1, name="cifar10 strided"),
    stf_row("enwik8", batch_size=4, name="enwik8 fixed"),
    stf_row("enwik8-dense", batch_size=4, name="enwik8 dense"),
    stf_row("enwik8", batch_size=1, length=65536, name="enwik8 fixed 65,536"),
    stf_row("enwik8-dense", batch_size=1, length=65536, name="enwik8 dense 65,536"),
    torch_row("strided", recompute=True, name="cifar10 strided"),
    torch_row("fixed", name="cifar10 fixed"),
    torch_row("dense", model="enwik8", batch_size=4, name="enwik8 dense"),
    torch_row("fixed", model="enwik8", batch_size=4, name="enwik8 fixed"),
]


def make_config(row):
    """Arguments of `SparseTransformer`."""
    import stf

    config = stf.models.presets.preset(row["preset"]) | {"recompute": row["recompute"]}
    if row["blocks"]:
        config["num_blocks"] = row["blocks"]
    if row["length"]:
        width = row["stride"] or 128
        config["length"] = row["length"]
        config["position_shape"] = (-(-row["length"] // width), width)
    if row["stride"]:
        config["patterns"] = [stf.patterns.Local(row["stride"]), stf.patterns.Strided(row["stride"])]
    return config


def measure_ours(row, profiled):
    """One row of ours, in this process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    begin = time.perf_counter()
    import keras
    import numpy as np
    import tensorflow as tf

    import stf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, row["gpus"] == 1)  # of parts that grow, some is lost between
    keras.config.set_dtype_policy("mixed_bfloat16")
    config = make_config(row)
    gpus = [f"GPU:{place}" for place in range(row["gpus"])]
    strategy = stf.distribution.SequenceParallel(devices=gpus) if len(gpus) > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        model = stf.models.SparseTransformer(**config, seed=1)
        model.compile(
            stf.training.optimizer(3.5e-4, average=0.999),
            stf.training.cross_entropy(),
            metrics=[stf.training.BitsPerDim()],
        )
    tokens = np.random.default_rng(0).integers(0, 256, (row["batch_size"], config["length"])).astype("int32")
    dataset = tf.data.Dataset.from_tensors((tokens, tokens)).repeat().prefetch(2)
    iterator = iter(strategy.experimental_distribute_dataset(dataset) if len(gpus) > 1 else dataset)
    model.make_train_function()
    built = time.perf_counter() - begin

    def steps(count):
        for _ in range(count):
            logs = model.train_function(iterator)
        return float(logs["loss"])  # waits for the device

    begin = time.perf_counter()
    with stf.distribution.exchanges.bytes_counted() as sent:
        first_loss = steps(1)
    first = time.perf_counter() - begin
    steps(1)
    begin = time.perf_counter()
    steps(2)
    groups, count = (6, 4) if time.perf_counter() - begin < 1 else (3, 1)
    if profiled:
        import device_profile

        if len(gpus) > 1:
            return {"exchanges": device_profile.exchanges(lambda: steps(1))}
        busy, kernels = device_profile.profile(lambda: steps(2))
        return {"busy_ms": busy / 2 * 1e3, "kernels": [[name, n / 2, 1e3 * s / 2] for name, n, s in kernels[:40]]}
    for gpu in gpus:
        tf.config.experimental.reset_memory_stats(gpu)
    ms, loss = median_step(steps, groups, count)
    return {
        "parameters": model.count_params(),
        "build_s": built,
        "first_call_s": first,
        "ms": ms,
        "tokens_per_s": tokens.size / ms * 1e3,
        "peak_GiB": max(tf.config.experimental.get_memory_info(gpu)["peak"] for gpu in gpus) / 2**30,
        "sent_GB": sum(sent) / 1e9,
        "loss": [first_loss, loss],
        "skipped": int(tf.convert_to_tensor(model.optimizer.skipped)),
    }


def measure_rates():
    """The device's name, and what it reaches: bytes read plus written, and bfloat16 operations, a second."""
    import tensorflow as tf

    gpu = tf.config.list_physical_devices("GPU")[0]
    size, count = 8192, 2**29
    a, b = (tf.cast(tf.random.stateless_normal([size, size], [1, k]), tf.bfloat16) for k in range(2))
    x = tf.cast(tf.random.stateless_uniform([count], [1, 2]), tf.bfloat16)

    def rate(work, amount, *inputs):
        function, best = tf.function(work, jit_compile=True), 0.0
        for _ in range(8):
            tf.reshape(function(*inputs), [-1])[0].numpy()
            begin = time.perf_counter()
            for _ in range(10):
                result = function(*inputs)
            tf.reshape(result, [-1])[0].numpy()
            best = max(best, 10 * amount / (time.perf_counter() - begin))
        return best

    return {
        "device": tf.config.experimental.get_device_details(gpu)["device_name"],
        "versions": {"tensorflow": tf.__version__, "python": platform.python_version()},
        "matmul": rate(tf.matmul, 2 * size**3, a, b),
        "copy": rate(lambda x: -x, 4 * count, x),
    }


def command_line():
    """How this program was called, without where its results went, which is nobody else's."""
    called = " ".join([f"python benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])
    return re.sub(r" --output[= ]\S+", "", called)


def median_step(steps, groups, count):
    """Milliseconds of a step, the median of groups of `count`, and the last loss; `steps` waits for the device."""
    times = []
    for _ in range(groups):
        begin = time.perf_counter()
        loss = steps(count)
        times.append((time.perf_counter() - begin) / count)
    return 1e3 * statistics.median(times), loss


def run_child(*arguments, environment=None, seconds=600):
    """The JSON object that a process prints last, or what it died of."""
    command = [sys.executable, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {seconds} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def run_row(row, rates, profiles):
    """A row with everything that was measured of it."""
    if row["side"] == "torch":
        options = {"kind": row["kind"], "model": row["model"], "batch_size": row["batch_size"]}
        options |= {"num_blocks": row["blocks"], "length": row["length"]}
        options["stride"] = STRIDE if row["model"] == "cifar10" and row["kind"] == "strided" else None
        flags = [f"--{name}={value}" for name, value in options.items() if value]
        # PyTorch must not find the CUDA libraries that were put in TensorFlow's way.
        environment = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
        script = HERE / "peers" / "torch_transformer.py"
        return row | run_child(script, *flags, *(["--recompute"] if row["recompute"] else []), environment=environment)
    found = run_child(__file__, "--row", json.dumps(row))
    if "error" not in found:
        import step_floor

        ceilings = step_floor.Ceilings(rates["copy"], rates["matmul"])
        config = make_config(row)
        found["floor_ms"] = 1e3 * step_floor.floor(config, row["batch_size"], ceilings, row["recompute"])
        found["share"] = found["floor_ms"] / found["ms"]
        if profiles:
            seen = os.environ | {
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer=",
            }
            profile = run_child(__file__, "--row", json.dumps(row), "--profile", environment=seen)
            if "error" in profile:
                found["profile_error"] = profile["error"]
            else:
                found |= profile | {"busy": profile["busy_ms"] / found["ms"]}
    return row | found


def line(row):
    """A row of the table."""

    def cell(name, form):
        return format(row[name], form) if name in row else "–"

    blocks = row["blocks"] or "all"
    start = f"{row['name']:22s} {row['side']:6s} {blocks!s:>6s} {row['recompute']!s:>9s}"
    if "error" in row:
        return f"{start}  {row['error'][:90]}"
    numbers = [("first_call_s", "7.1f"), ("ms", "9.1f"), ("tokens_per_s", "11,.0f"), ("peak_GiB", "7.2f")]
    numbers += [("floor_ms", "8.1f"), ("share", "6.2f"), ("busy", "5.2f")]
    return start + " ".join(cell(*number) for number in numbers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run only rows whose name contains this")
    parser.add_argument("--rows", default="", help="run only rows of these numbers, from 0, such as 0,3,4")
    parser.add_argument("--peers", default="torch", help="empty: ours alone")
    parser.add_argument("--profiles", default="0", help="numbers of the rows that are profiled too")
    parser.add_argument("--output", default=str(HERE / "results" / "train_step.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rates", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rates:
        return print(json.dumps(measure_rates()))
    if options.row:
        return print(json.dumps(measure_ours(json.loads(options.row), options.profile)), flush=True)
    numbers = [int(k) for k in options.rows.split(",")] if options.rows else range(len(ROWS))
    profiled = [int(k) for k in options.profiles.split(",") if k]
    rates = run_child(__file__, "--rates")
    if "error" in rates:
        sys.exit(f"no rates: {rates['error']}")
    print(
        f"{rates['device']}: matmul {rates['matmul'] / 1e12:.0f} TFLOP/s bfloat16, copy {rates['copy'] / 1e9:.0f} GB/s"
    )
    print("row                    side   blocks recompute first s  ms step    tokens/s     GiB floor ms  share  busy")
    result = rates | {"command": command_line(), "rows": []}
    for number in numbers:
        row = ROWS[number]
        if options.only not in row["name"] or (row["side"] != "stf" and row["side"] not in options.peers.split(",")):
            continue
        result["rows"].append(run_row(row, rates, number in profiled))
        print(line(result["rows"][-1]), flush=True)
        pathlib.Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(options.output).write_text(json.dumps(result, indent=1) + "\n")  # after every row
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
