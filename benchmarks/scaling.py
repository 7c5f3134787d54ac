"""A training step of the paper's CIFAR-10 model on one GPU and on all of a machine, at 16 images a GPU, in one run.

    python benchmarks/scaling.py                # the table, and benchmarks/results/scaling.json

Each row runs in a process of its own: `compile` under MirroredStrategy and a step as `fit` runs it, in mixed_bfloat16,
with clipping, AdamW, its moving average and the metric. Milliseconds: the median of six groups of four steps, each
group waited for once. Bits: a hash of all weights and of the optimizer's variables on each GPU after the same number of
steps; they must agree between GPUs, and between two runs. All-reduce: that of all gradients as one vector, alone, over
twenty of them. What more GPUs would reach is computed from both (`on_paper`), and says so.
"""

import argparse
import hashlib
import json
import os
import pathlib
import time

import train_step

HERE = pathlib.Path(__file__).resolve().parent
IMAGES = 16  # a GPU
ROWS = [
    dict(gpus=1, recompute=False, dtype=None),
    dict(gpus="all", recompute=False, dtype=None),
    dict(gpus="all", recompute=False, dtype=None),
    dict(gpus="all", recompute=False, dtype="float16"),
    dict(gpus=1, recompute=True, dtype=None),
    dict(gpus="all", recompute=True, dtype=None),
]
NETWORK = 50e9  # bytes a second that a GPU sends to another machine: eight 400 Gb/s adapters for eight GPUs


def bits_of(model, replica):
    """A hash of what a replica holds of all variables."""
    digest = hashlib.sha256()
    for variable in model.variables + model.optimizer.variables:
        parts = model.distribute_strategy.experimental_local_results(variable.value)
        digest.update(parts[min(replica, len(parts) - 1)].numpy().tobytes())
    return digest.hexdigest()[:16]


def measure_all_reduce(strategy, size, dtype):
    """Milliseconds of the sum of one vector over all GPUs."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(count):
        def in_replica():
            x = tf.ones([size], dtype)
            for _ in range(count):
                [x] = tf.distribute.get_replica_context().all_reduce("SUM", [x * tf.constant(0.5, dtype)])
            return x[0]

        return strategy.experimental_local_results(strategy.run(in_replica))

    def seconds(count):
        step(count)[0].numpy()
        begin = time.perf_counter()
        step(count)[0].numpy()
        return time.perf_counter() - begin

    return 1e3 * (seconds(21) - seconds(1)) / 20


def measure(row):
    """One row, in this process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import numpy as np
    import tensorflow as tf

    import stf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    strategy = tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        model = stf.models.SparseTransformer.from_preset("cifar10", recompute=row["recompute"], seed=1)
        model.compile(
            stf.training.optimizer(3.5e-4, average=0.999, all_reduce_dtype=row["dtype"]),
            stf.training.cross_entropy(),
            metrics=[stf.training.BitsPerDim()],
        )
    batch = IMAGES * len(gpus)
    tokens = np.random.default_rng(0).integers(0, 256, (4, batch, 3072)).astype("int32")
    dataset = tf.data.Dataset.from_tensor_slices((tokens, tokens)).repeat().prefetch(2)
    iterator = iter(strategy.experimental_distribute_dataset(dataset))
    model.make_train_function()

    def steps(count):
        for _ in range(count):
            logs = model.train_function(iterator)
        return float(logs["loss"])  # waits for the devices

    begin = time.perf_counter()
    first_loss = steps(1)
    first = time.perf_counter() - begin
    steps(3)
    ms, loss = train_step.median_step(steps, 6, 4)
    found = {
        "devices": len(gpus),
        "name": tf.config.experimental.get_device_details(gpus[0])["device_name"],
        "tensorflow": tf.__version__,
        "first_call_s": first,
        "ms": ms,
        "tokens_per_s": batch * 3072 / ms * 1e3,
        "loss": [first_loss, loss],
        "skipped": int(tf.convert_to_tensor(model.optimizer.skipped)),
        "bits": [bits_of(model, replica) for replica in range(len(gpus))],
    }
    if len(gpus) > 1:
        size = sum(variable.shape.num_elements() for variable in model.trainable_variables)
        found["all_reduce_bytes"] = size * tf.as_dtype(row["dtype"] or "float32").size
        found["all_reduce_ms"] = measure_all_reduce(strategy, size, row["dtype"] or "float32")
    return found


def on_paper(one, many):
    """Tokens a second that more GPUs would reach, were the sum all that grows.

    A ring of N sends 2 (N - 1) / N of the vector over each link: at the rate measured here within a machine of eight,
    at `NETWORK` between machines. Nothing of it is hidden behind the backward pass, here as there.
    """
    count, size = many["devices"], many["all_reduce_bytes"]
    rate = size * 2 * (count - 1) / count / many["all_reduce_ms"] * 1e3
    rest = many["ms"] - many["all_reduce_ms"]
    found = []
    for gpus in (8, 64):
        link = rate if gpus <= 8 else min(rate, NETWORK)
        ms = rest + 1e3 * size * 2 * (gpus - 1) / gpus / link
        found.append({"gpus": gpus, "ms": ms, "times_one": gpus * one["ms"] / ms, "bytes_per_s": link})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="run only rows of these numbers, from 0, such as 0,1,2")
    parser.add_argument("--output", default=str(HERE / "results" / "scaling.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        return print(json.dumps(measure(json.loads(options.row))), flush=True)
    result = {"command": train_step.command_line(), "rows": []}
    rows = [ROWS[int(k)] for k in options.rows.split(",")] if options.rows else ROWS
    print("gpus recomputed  summed in   first s  ms step     tokens/s  times one  all-reduce ms  bits")
    for row in rows:
        only = {"CUDA_VISIBLE_DEVICES": "0"} if row["gpus"] == 1 else {}
        found = train_step.run_child(__file__, "--row", json.dumps(row), environment=os.environ | only)
        result["rows"].append(row | found)
        one = next((r for r in result["rows"] if r.get("devices") == 1 and r["recompute"] == row["recompute"]), None)
        if "error" in found:
            print(row, found["error"], flush=True)
        else:
            times = found["tokens_per_s"] / one["tokens_per_s"] if one else float("nan")
            print(
                f"{found['devices']:4d} {'all' if row['recompute'] else 'nothing':>10s}"
                f"{row['dtype'] or 'float32':>11s}"
                f"{found['first_call_s']:10.1f}{found['ms']:9.1f}{found['tokens_per_s']:13,.0f}{times:11.2f}"
                f"{found.get('all_reduce_ms', 0):15.2f}  {' '.join(found['bits'])}",
                flush=True,
            )
            if one and found["devices"] > 1:
                result["rows"][-1]["on_paper"] = on_paper(one, found)
                for more in result["rows"][-1]["on_paper"]:
                    print(f"     on paper, {more['gpus']} GPUs: {more['times_one']:.1f} times one", flush=True)
        pathlib.Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(options.output).write_text(json.dumps(result, indent=1) + "\n")  # after every row
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
