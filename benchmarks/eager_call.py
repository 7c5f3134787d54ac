"""What an eager call costs the host: `stf.ops.attention` beside TensorFlow's own ops, on small problems.

    python benchmarks/eager_call.py                   # the table, and benchmarks/results/eager_call.json

On a GPU kernels run behind the host, and the numbers are the host's alone; on a CPU they hold one small kernel, so that
the floor is a call of `tf.matmul` of the same inputs. The goal is 60 us a call.
"""

import json
import os
import pathlib
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from absl import app, flags

import stf
from stf.patterns import Blocks, Local, PerHead, Strided

SHAPE = 1, 16, 2, 16
ROUNDS, CALLS = 15, 400
RESULTS = pathlib.Path(__file__).parent / "results" / "eager_call.json"

flags.DEFINE_string("output", str(RESULTS), "Where the JSON goes.")


def microseconds(call):
    """Of the median and the fastest round, a call's share."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return float(np.median(times)), float(np.min(times))


def with_gradient(forward, x):
    def call():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward()
        return tape.gradient(y, x)

    return call


def main(_):
    gpus = tf.config.list_physical_devices("GPU")
    x = tf.random.stateless_normal(SHAPE, [1, 2])
    lengths = tf.constant([11])
    calls = {
        "tf.identity": lambda: tf.identity(x),
        "tf.matmul": lambda: tf.matmul(x, x, transpose_b=True),
        "local": lambda: stf.ops.attention(x, x, x, Local(4)),
        "local, lengths": lambda: stf.ops.attention(x, x, x, Local(4), lengths=lengths),
        "local + strided": lambda: stf.ops.attention(x, x, x, Local(4) | Strided(4)),
        "local, strided by head": lambda: stf.ops.attention(x, x, x, PerHead([Local(4), Strided(4)])),
        "blocks": lambda: stf.ops.attention(x, x, x, Blocks(np.tril(np.ones((16, 16), bool)), 1)),
    }
    pattern = Blocks(np.tril(np.ones((16, 16), bool)), 1)
    calls["blocks, the same object"] = lambda: stf.ops.attention(x, x, x, pattern)
    calls["tf.matmul with its gradient"] = with_gradient(calls["tf.matmul"], x)
    calls["local with its gradient"] = with_gradient(calls["local"], x)
    name = tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else platform.processor()
    device = name or "CPU"
    rows = []
    print(f"{device}, TensorFlow {tf.__version__}: us of an eager call, median and fastest of {ROUNDS} rounds")
    for name, call in calls.items():
        median, fastest = microseconds(call)
        rows.append({"call": name, "us": median, "fastest_us": fastest})
        print(f"{name:32} {median:8.1f} {fastest:8.1f}", flush=True)
    result = {
        "device": device,
        "tensorflow": tf.__version__,
        "command": "python benchmarks/eager_call.py",
        "shape": SHAPE,
        "rows": rows,
    }
    pathlib.Path(flags.FLAGS.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
