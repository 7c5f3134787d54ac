"""Losses and gradients of small models on one device and on several that share each sequence, a line of JSON each.

    python sequence_parallel.py COUNT NAME...     # on CPUs; on GPUs with STF_DEVICES=GPU

A name is a case and a dtype policy, or "fit", "more fits", "refused". Of each case: the loss on one device and on
COUNT; for each weight's gradient how far it is from float64's, as a share of that one's largest, the worst of all
weights, on one and on COUNT (in float64: from each other); whether two runs on COUNT have the same bits; and the bytes
sent between devices.
"""

import json
import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

KIND = os.environ.get("STF_DEVICES", "CPU")
COUNT = int(sys.argv[1])
if KIND == "CPU":
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * max(COUNT, 4))
else:
    tf.config.experimental.enable_tensor_float_32_execution(False)

import stf  # noqa: E402
from stf.distribution.exchanges import bytes_counted  # noqa: E402

P = stf.patterns
BANDS = np.tril(np.ones((8, 8), bool)) & ~np.tril(np.ones((8, 8), bool), -2)
GLOBAL = BANDS | (np.arange(8)[None, :] == 0)
SUMMARIES = P.Summary(8, 4, 0) | P.OwnBlock(16)
ALL = [P.Local(8), P.Strided(8), P.Fixed(8, 4), P.Causal()]
CASES = {
    "strided": dict(patterns=[P.Local(8), P.Strided(8)], batch=1),
    "strided ragged": dict(patterns=[P.Local(8), P.Strided(8)], length=90),
    "strided merged": dict(patterns=[P.Local(8) | P.Strided(8)]),
    "three to one": dict(patterns=[P.Local(8)] * 3 + [P.Strided(8)], blocks=5),
    "fixed": dict(patterns=[P.Fixed(8, 4)], length=128, batch=1),
    "fixed ragged": dict(patterns=[P.Fixed(8, 4)], length=121, batch=1),
    "fixed, one sub-block": dict(patterns=[P.Fixed(8, 2, 1), P.OwnBlock(8)], length=256),
    "summary": dict(patterns=[P.Summary(8, 4), P.PerHead([SUMMARIES, P.Fixed(8, 4, 1)])], length=128),
    "causal": dict(patterns=[P.Causal()], length=50),
    "blocks": dict(patterns=[P.Blocks(BANDS, 12), P.Blocks(GLOBAL, 12)]),
    "per head": dict(patterns=[P.PerHead([P.Local(8), P.Strided(8)]), P.PerHead([P.Strided(8), P.Strided(16)])]),
    "short": dict(patterns=[P.Local(2), P.Strided(2), P.Causal()], length=9, width=3),
    "far": dict(patterns=[P.Local(60), P.Strided(7)]),
    "attention kept": dict(patterns=ALL, length=128, recompute="attention"),
    "all kept": dict(patterns=ALL, length=128, recompute=False),
}


def gradients(strategy, dtype, patterns, length=96, recompute=True, blocks=4, heads=3, dropout=0.1, batch=3, width=8):
    """The loss, and all gradients, of a model of random weights."""
    with strategy.scope():
        model = stf.models.SparseTransformer(
            length, (-(-length // width), width), patterns, blocks, heads, 24, vocab_size=16, key_dim=8, value_dim=16,
            recompute=recompute, dropout=dropout, seed=1, conditions=(3,), dtype=dtype,
        )  # fmt: skip
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy(), jit_compile=False)
    random = np.random.default_rng(0)
    # The same in every dtype, rounded as bfloat16's are.
    for w in model.trainable_variables:
        w.assign(tf.cast(tf.cast(random.normal(float("gamma" in w.path), 0.2, w.shape), tf.bfloat16), w.dtype))
    tokens = random.integers(0, 16, (batch, length)).astype("int32")
    weights = random.uniform(0.5, 1.5, (batch, length)).astype("float32")
    data = (tokens, np.array([[0], [2], [1]], "int32")[:batch]), tokens, weights

    def in_replica():
        logs, grads = model._loss_and_gradients(tf.nest.map_structure(tf.constant, data))
        return logs["loss"], [tf.convert_to_tensor(grad) for grad in grads]

    loss, grads = tf.function(lambda: strategy.run(in_replica), autograph=False)()
    scale = float(getattr(model.optimizer, "initial_scale", 1.0))  # of the loss, in float16
    return float(loss), [np.array(strategy.experimental_local_results(grad)[0]) / scale for grad in grads]


def apart(grads, exact):
    """The largest difference of each gradient, as a share of the exact one's largest; the worst."""
    return max(np.abs(g - e).max() / max(np.abs(e).max(), 1e-9) for g, e in zip(grads, exact, strict=True))


def compare(name, dtype):
    one = tf.distribute.OneDeviceStrategy(f"{KIND}:0")
    several = stf.distribution.SequenceParallel(devices=[f"{KIND}:{place}" for place in range(COUNT)])
    losses, alone = gradients(one, dtype, **CASES[name])
    with bytes_counted() as sent:
        loss, grads = gradients(several, dtype, **CASES[name])
    same = None  # in float64 attention is the dense reference, which no kernel runs
    if dtype != "float64":
        again = gradients(several, dtype, **CASES[name])[1]
        same = all((a == b).all() for a, b in zip(grads, again, strict=True))
    exact = alone if dtype == "float64" else gradients(one, "float64", **CASES[name])[1]
    return {
        "loss": [losses, loss],
        "apart": [apart(alone, exact), apart(grads, exact)],
        "same_bits": same,
        "bytes": sum(sent),
    }


TOKENS = np.random.default_rng(0).integers(0, 16, (13, 96)).astype("int32")


def parallel(devices, per_sequence=None):
    """A strategy, of whose collective operations no other strategy of this process has the keys."""
    tf.distribute.MirroredStrategy._collective_key_base += 1000
    return stf.distribution.SequenceParallel(per_sequence, [f"{KIND}:{place}" for place in range(devices)])


def make_model(strategy, **options):
    with strategy.scope():
        model = stf.models.SparseTransformer(
            96, (12, 8), [P.Local(8), P.Strided(8)], 2, 2, 16, vocab_size=16, seed=1, recompute=True
        )
        optimizer = options.pop("optimizer", lambda: stf.training.optimizer(1e-2, average=0.9))()
        options = {"loss": stf.training.cross_entropy(), "weighted_metrics": [stf.training.BitsPerDim()]} | options
        model.compile(optimizer, jit_compile=False, **options)
    return model


def fit(model, epochs=2, validated=False):
    """The losses of a few steps; the last batch of each epoch is not whole."""
    data = {"validation_data": (TOKENS[:6], TOKENS[:6]), "validation_batch_size": 4} if validated else {}
    return model.fit(TOKENS, TOKENS, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **data).history


def compare_fits():
    """What `fit` gives on one device and on several, and what of it is saved and loaded."""
    one, two = tf.distribute.OneDeviceStrategy(f"{KIND}:0"), parallel(2)
    models = {"one": make_model(one), "two": make_model(two)}
    found = {name: fit(model, validated=True) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        models["two"].save(path)
        with parallel(4).scope():
            loaded = keras.saving.load_model(path)
    of_both = (models["two"], loaded)
    found["evaluated"] = [model.evaluate(TOKENS[:4], TOKENS[:4], verbose=0)[0] for model in of_both]
    return found


def compare_more_fits():
    """Other ways to train, and what goes on."""
    one, two = tf.distribute.OneDeviceStrategy(f"{KIND}:0"), parallel(2)
    models = {"one": make_model(one), "two": make_model(two), "two again": make_model(two)}
    models["two times two"] = make_model(parallel(4, 2))
    found = {name: fit(model) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        models["two"].save(path)
        loaded = {}
        for name, strategy in (("one", one), ("four", parallel(4))):
            with strategy.scope():
                loaded[name] = keras.saving.load_model(path)
    with bytes_counted() as sent:
        found["by Keras' Adam"] = [
            fit(make_model(each, optimizer=lambda: keras.optimizers.Adam(1e-2))) for each in (one, two)
        ]
    found["sent"] = sum(sent)
    found["goes on"] = [fit(model, epochs=1)["loss"] for model in loaded.values()]
    return found


def refusals():
    """What is said of a loss that is no mean, and of a length that is not known."""
    found = {}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    try:
        make_model(parallel(2), loss=loss, weighted_metrics=None).fit(TOKENS[:2], TOKENS[:2], verbose=0)
    except ValueError as error:
        found["loss"] = str(error)
    strategy = parallel(2)
    model = make_model(strategy)

    @tf.function(input_signature=[tf.TensorSpec([2, None], tf.int32)], autograph=False)
    def step(tokens):
        return strategy.run(lambda x: model._loss_and_gradients((x, x)), args=(tokens,))

    try:
        step(TOKENS[:2])
    except ValueError as error:
        found["positions"] = str(error)
    lengths = [len(model.fit(TOKENS[:2, :n], TOKENS[:2, :n], verbose=0).history["loss"]) for n in (96, 90, 17)]
    return found | {"fits of other lengths": lengths}


RUNS = {"fit": compare_fits, "more fits": compare_more_fits, "refused": refusals}


def main():
    for name in sys.argv[2:]:
        if name in RUNS:
            found = RUNS[name]()
        else:
            found = compare(*name.split("/"))
        print(json.dumps({"name": name} | found), flush=True)


if __name__ == "__main__":
    main()
