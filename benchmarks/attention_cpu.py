"""Attention on the CPU, beside its peers and its floor, all measured in one run.

    python benchmarks/attention_cpu.py                    # the table, and benchmarks/results/attention_cpu.json
    python benchmarks/attention_cpu.py --only=strided     # rows whose pattern's name has the word

float32, batch 1, 2 heads, d_qk 64, d_v 128, 2 threads; results are checked before they are timed. The floor of a
row is the larger of its exact floating-point operations over the matmul rate and its least bytes over the copy rate,
both measured first. A row's share is floor / time: 1 is the hardware's limit for code that never reuses a cache between
calls.
Peers: Keras' own dense attention (`keras.ops.nn.dot_product_attention`, in a tf.function) and, where PyTorch
is installed, its scaled_dot_product_attention, dense and on the sequence transposed by the expert's hand.
"""

import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from absl import app, flags

import stf
from stf.patterns import Causal, Fixed, Local, PerHead, Strided

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from ops.float64_reference import Inputs, Results, error_budgets, largest_errors

BATCH, HEADS, KEY_DIM, VALUE_DIM, THREADS = 1, 2, 64, 128, 2
CHECKED = 1024  # positions whose results are held against float64
RESULTS = pathlib.Path(__file__).parent / "results" / "attention_cpu.json"

flags.DEFINE_string("only", "", "Run only rows whose pattern's name contains this.")
flags.DEFINE_string("output", str(RESULTS), "Where the JSON goes.")
flags.DEFINE_integer("repeats", 15, "Timed calls of each row; the median counts.")
flags.DEFINE_bool("growth", True, "Also measure growth to 196,608 positions and run 1,048,576.")
flags.DEFINE_integer("positions", 0, "Internal: run this many positions once and print peak bytes.")


def median_time(call, repeats):
    """Median seconds of a call, after a warm-up that fills pools and caches."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def rates(repeats):
    """This machine's matmul rate (FLOP/s) by dtype and copy rate (bytes/s, read plus write)."""
    matmul = {}
    for dtype in (tf.float32, tf.bfloat16):
        a, b = (tf.cast(tf.random.normal([2048, 2048]), dtype) for _ in range(2))
        matmul[dtype.name] = 2 * 2048**3 / median_time(lambda a=a, b=b: tf.matmul(a, b).numpy(), repeats)
    x = tf.random.normal([64 << 20])
    copy = tf.function(lambda x: tf.raw_ops.Snapshot(input=tf.identity(x) * 1.0))
    seconds = median_time(lambda: copy(x), repeats)
    source, target = np.ones(64 << 20, np.float32), np.empty(64 << 20, np.float32)
    plain = median_time(lambda: np.copyto(target, source), repeats)
    return matmul, 2 * x.shape[0] * 4 / min(seconds, plain)


def inputs(positions, dtype=tf.float32):
    shapes = [[BATCH, positions, HEADS, d] for d in (KEY_DIM, KEY_DIM, VALUE_DIM, VALUE_DIM)]
    # (tf.random.normal would hold three of each for a moment.)
    return [tf.cast(tf.raw_ops.RandomStandardNormal(shape=shape, dtype=tf.float32), dtype) for shape in shapes]


def passes(attend, query, key, value, grad):
    """Forward, and forward with backward, of `attend` as compiled functions without arguments."""

    @tf.function(reduce_retracing=True)
    def forward(query, key, value):
        return attend(query, key, value)

    @tf.function(reduce_retracing=True)
    def backward(query, key, value, grad):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            output = attend(query, key, value)
        return tape.gradient(output, [query, key, value], grad)

    return lambda: forward(query, key, value), lambda: backward(query, key, value, grad)


def ours(pattern, arrays):
    """`passes` of the op."""
    return passes(lambda q, k, v: stf.ops.attention(q, k, v, pattern), *arrays)


def check(pattern, arrays):
    """Holds the op's output and gradients at the first positions against float64, as its tests do.

    Patterns are causal: without a gradient from later positions these are the results of a sequence that ends there.
    """
    *tensors, grad = arrays
    early = tf.concat([grad[:, :CHECKED], tf.zeros_like(grad[:, CHECKED:])], 1)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output, log_sum_exp = stf.ops.attention(*tensors, pattern, return_log_sum_exp=True)
    found = [x[:, :CHECKED].numpy() for x in (output, *tape.gradient(output, tensors, early))]
    found.insert(1, log_sum_exp[:, :, :CHECKED].numpy())
    cut = [x[:, :CHECKED].numpy() for x in arrays]
    mask = np.stack([pattern.mask(cut[0].shape[1], head) for head in range(HEADS)])
    truth, budgets = error_budgets(Inputs(*cut, np.zeros_like(found[1]), None, KEY_DIM**-0.5), mask)
    for name, error, budget in zip(Results._fields, largest_errors(found, truth), budgets, strict=True):
        if not error <= budget:
            raise AssertionError(f"{pattern}: {name} is wrong by {error:.3g}, more than {budget:.3g}")


def torch_passes(attend, arrays):
    """The same for a PyTorch function of query, key and value."""
    import torch

    query, key, value, grad = (torch.from_numpy(x.numpy()) for x in arrays)

    def forward():
        with torch.no_grad():
            return attend(query, key, value)

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]

    def backward():
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves).backward(grad)

    return forward, backward


def torch_sdpa(stride):
    """SDPA over [batch, position, head, depth]; with a stride, over the transposed sequence."""
    import torch

    def attend(query, key, value):
        if stride is None:
            rows = (x.transpose(1, 2) for x in (query, key, value))
            return torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
        b, n, h, _ = query.shape
        rows = (x.reshape(b, n // stride, stride * h, -1).transpose(1, 2) for x in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True)
        return output.transpose(1, 2).reshape(b, n, h, -1)

    return attend


def peers(pattern, positions, arrays):
    """Name -> (forward, backward) of what a user has elsewhere for the same result."""
    import keras

    def dense(query, key, value):
        return keras.ops.nn.dot_product_attention(query, key, value, is_causal=True)

    found = {}
    if positions <= 12288:
        found["keras dense"] = passes(dense, *arrays)
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(THREADS)
    if positions <= 12288:
        found["torch sdpa dense"] = torch_passes(torch_sdpa(None), arrays)
    if isinstance(pattern, Strided) and positions % pattern.stride == 0:
        found["torch sdpa transposed"] = torch_passes(torch_sdpa(pattern.stride), arrays)
    return found


def floor(pattern, positions, backward, matmul, copy, itemsize=4):
    """(seconds, useful FLOPs) of the limit that this machine's two rates set."""
    shape = dict(key_dim=KEY_DIM, value_dim=VALUE_DIM, num_heads=HEADS, batch=BATCH, backward=backward)
    flops = pattern.flops(positions, **shape)
    moved = pattern.bytes(positions, itemsize=itemsize, **shape)
    return max(flops / matmul, moved / copy), flops


def row(pattern, positions, implementation, which, seconds, limit, flops, dtype="float32"):
    return {
        "shape": [BATCH, HEADS, positions, KEY_DIM, VALUE_DIM],
        "pattern": repr(pattern),
        "implementation": implementation,
        "dtype": dtype,
        "pass": which,
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * limit,
        "share": limit / seconds,
        "gflops": flops / seconds / 1e9,
    }


def measure(pattern, positions, matmul, copy, repeats, dtype=tf.float32, with_peers=True):
    """Rows of ours and the peers, forward and forward+backward."""
    arrays = inputs(positions, dtype)
    check(pattern, arrays)
    runs = {"stf": ours(pattern, arrays)}
    if with_peers:
        runs |= peers(pattern, positions, arrays)
    rows = []
    for index, which in enumerate(("forward", "forward+backward")):
        limit, flops = floor(pattern, positions, index == 1, matmul["float32"], copy, dtype.size)
        for name, calls in runs.items():
            slow = name != "stf" and positions > 3072
            seconds = median_time(calls[index], 3 if slow else repeats)
            rows.append(row(pattern, positions, name, which, seconds, limit, flops, dtype.name))
            print_row(rows[-1])
    return rows


def print_row(r):
    print(
        f"{r['pattern'][:44]:44s} {r['shape'][2]:8,d} {r['dtype']:9s}{r['implementation']:22s}{r['pass']:17s}"
        f"{r['ms']:10.3f} ms {r['gflops']:8.1f} GFLOP/s  floor {r['floor_ms']:8.3f} ms  share {r['share']:5.2f}",
        flush=True,
    )


def ratios(rows):
    """How many times faster ours is than each peer, row by row."""
    of_stf = {
        (r["pattern"], r["shape"][2], r["pass"]): r["ms"]
        for r in rows
        if r["implementation"] == "stf" and r["dtype"] == "float32"
    }
    found = []
    for r in rows:
        if r["implementation"] == "stf":
            continue
        ratio = r["ms"] / of_stf[r["pattern"], r["shape"][2], r["pass"]]
        found.append({**{k: r[k] for k in ("pattern", "shape", "pass", "implementation")}, "times_faster": ratio})
        print(
            f"{r['pattern'][:44]:44s} {r['shape'][2]:8,d} {r['pass']:17s} "
            f"stf is {ratio:7.1f}x as fast as {r['implementation']}"
        )
    return found


def growth(repeats):
    """Time of strided attention against n with l = sqrt(n), and the exponent fitted to it."""
    points = []
    for positions in (3072, 12288, 49152, 196608):
        stride = round(math.sqrt(positions))
        pattern = PerHead([Local(stride), Strided(stride)])
        arrays = inputs(positions)
        check(pattern, arrays)
        call = ours(pattern, arrays)[1]
        points.append((positions, median_time(call, max(3, repeats // 3))))
        print(
            f"both strided heads, l={stride}, n={positions:,}: {1e3 * points[-1][1]:.1f} ms forward+backward",
            flush=True,
        )
    exponent = float(np.polyfit(*np.log(np.array(points)).T, 1)[0])
    print(f"time grows as n^{exponent:.2f} from n = 3,072 to 196,608")
    return {"points": [{"positions": n, "ms": 1e3 * s} for n, s in points], "exponent": exponent}


def peak_bytes():
    """Most memory that this process has held. (ru_maxrss would count what its parent held before exec.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def run_once(positions):
    """Forward and backward of both strided heads over `positions`, in this process; peak bytes."""
    stride = round(math.sqrt(positions))
    arrays = inputs(positions)
    before = peak_bytes()
    call = ours(PerHead([Local(stride), Strided(stride)]), arrays)[1]
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"positions": positions, "seconds": seconds, "peak_bytes": peak_bytes(), "before_bytes": before}


def child(positions):
    """`run_once` in a process of its own, whose peak is that run's alone."""
    command = [sys.executable, __file__, f"--positions={positions}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    result = json.loads(lines[-1])
    print(
        f"n={positions:,}: {result['seconds']:.2f} s forward+backward, peak {result['peak_bytes'] / 2**30:.2f} GiB "
        f"of the process ({result['before_bytes'] / 2**30:.2f} GiB before the call: TensorFlow and the inputs)"
    )
    return result


def main(_):
    config = flags.FLAGS
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    if config.positions:
        print(json.dumps(run_once(config.positions)))
        return
    matmul, copy = rates(config.repeats)
    print(
        f"matmul 2048^3: {matmul['float32'] / 1e9:.0f} GFLOP/s float32, {matmul['bfloat16'] / 1e9:.0f} bfloat16; "
        f"copy {copy / 1e9:.1f} GB/s"
    )
    cases = [(Causal(), 3072)]
    for n in (3072, 12288):
        cases += [(Local(128), n), (Strided(128), n), (PerHead([Local(128), Strided(128)]), n)]
        cases += [(Local(128) | Strided(128), n), (Fixed(128, 32), n)]
    rows = []
    for pattern, positions in cases:
        if config.only.lower() in repr(pattern).lower():
            rows += measure(pattern, positions, matmul, copy, config.repeats)
            rows += measure(pattern, positions, matmul, copy, config.repeats, tf.bfloat16, with_peers=False)
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": THREADS,
        },
        "versions": {"stf": stf.__version__, "tensorflow": tf.__version__, "numpy": np.__version__},
        "command": "python benchmarks/attention_cpu.py",
        "matmul_flops": matmul,
        "copy_bytes_per_second": copy,
        "rows": rows,
        "ratios": ratios(rows),
    }
    if config.growth:
        result["growth"] = growth(config.repeats)
        result["memory"] = [child(n) for n in (3072, 65536, 1048576)]
    pathlib.Path(config.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {config.output}")


if __name__ == "__main__":
    app.run(main)
