"""Small runs on one and on two devices, as a process: prints what came of those that are named, as JSON.

Devices are two virtual CPUs, or what STF_DEVICES names, such as GPU:0,GPU:1.
"""

import functools
import json
import os
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

import stf
from stf.callbacks import Checkpoint, MovingAverage, StopOnNonFinite, TrainingLog

two = os.environ.get("STF_DEVICES", "CPU:0,CPU:1").split(",")
# Before TensorFlow computes anything.
[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@functools.cache
def mirrored():
    """The one strategy of this process: two of them would share TensorFlow's keys of collective operations."""
    return tf.distribute.MirroredStrategy(two)


tokens = np.random.default_rng(0).integers(0, 11, (8, 24)).astype("int32")


def run(strategy, rows=8, dtype="float32", jit_compile=False, **options):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        patterns = [stf.patterns.Local(4), stf.patterns.Strided(4)]
        model = stf.models.SparseTransformer(
            24, (6, 4), patterns, 3, 2, 16, vocab_size=11, seed=1, recompute=True, dtype=dtype
        )
        model.compile(
            stf.training.optimizer(1e-2, average=0.9, **options),
            stf.training.cross_entropy(),
            metrics=[stf.training.BitsPerDim()],
            jit_compile=jit_compile,
        )
    folder = tempfile.mkdtemp()
    callbacks = [TrainingLog(folder, every=1), StopOnNonFinite(), MovingAverage(), Checkpoint(folder + "/c.keras")]
    x = tokens[:rows]
    history = model.fit(
        x, x, batch_size=4, epochs=3, shuffle=False, verbose=0, validation_data=(x, x), callbacks=callbacks
    ).history
    weights = sum(float(np.abs(np.array(tf.convert_to_tensor(w))).sum()) for w in model.trainable_variables)
    return history["loss"] + history["bits_per_dim"] + history["val_loss"] + [weights]


def layers():
    """The losses of a plain Keras model of our layers."""
    with mirrored().scope():
        x = inputs = keras.Input((24,), dtype="int32")
        x = keras.layers.Embedding(11, 16)(x)
        x = stf.layers.SparseResidualBlock(stf.layers.StridedAttention(2, 8, stride=4), dropout=0.1, seed=1)(x)
        model = keras.Model(inputs, keras.layers.Dense(11)(x))
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy(), jit_compile=False)
    return model.fit(tokens, tokens, batch_size=4, epochs=4, shuffle=False, verbose=0).history["loss"]


def dropout():
    """What each replica's block makes of the same input; and whether the state of their seeds is one."""
    strategy = mirrored()
    with strategy.scope():
        stack = stf.layers.SparseResidualStack(1, [stf.patterns.Local(4)], 1, 8, dropout=0.5, seed=3)
        stack.build([None, None, 8])
    alone = stf.layers.SparseResidualStack(1, [stf.patterns.Local(4)], 1, 8, dropout=0.5, seed=3)
    alone.build([None, None, 8])
    alone.set_weights(stack.get_weights())
    x = tf.random.stateless_normal([1, 6, 8], [1, 2])
    found = []
    for jit_compile in (False, True):

        def in_replica(jit_compile=jit_compile):
            return tf.function(lambda: stack(x, training=True), jit_compile=jit_compile, autograph=False)()

        parts = strategy.experimental_local_results(tf.function(lambda: strategy.run(in_replica), autograph=False)())
        one = alone(x, training=True)
        found.append([bool(np.allclose(part, one, atol=1e-6)) for part in parts])
    states = [np.array(part).tolist() for part in strategy.experimental_local_results(stack.seed_generator.state.value)]
    return found, states


def broken_on_one():
    strategy = mirrored()
    with strategy.scope():
        weight = keras.Variable(np.ones(3, "float32"))
        optimizer = stf.training.optimizer(0.1)
        optimizer.build([weight])

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradient = tf.where(tf.equal(replica, 1), np.nan, 1.0) * tf.ones([3])
        optimizer.apply([gradient], [weight])

    with strategy.scope():
        tf.function(lambda: strategy.run(step))()
    return [float(x) for x in tf.convert_to_tensor(weight.value)] + [int(tf.convert_to_tensor(optimizer.skipped.value))]


def refused():
    """What is said of a dtype that the devices cannot sum."""
    try:
        run(mirrored(), all_reduce_dtype="bfloat16", jit_compile=True)
    except ValueError as error:
        return str(error)


if "GPU:0" in two:
    tf.config.experimental.enable_tensor_float_32_execution(False)
runs = {
    "one, under a strategy": lambda: run(tf.distribute.OneDeviceStrategy(two[0]), jit_compile=True),
    "one": lambda: run(tf.distribute.get_strategy()),
    "two": lambda: run(mirrored()),
    "one, accumulating": lambda: run(tf.distribute.get_strategy(), accumulation_steps=2),
    "two, accumulating": lambda: run(mirrored(), accumulation_steps=2),
    "one, ragged": lambda: run(tf.distribute.get_strategy(), rows=7),
    "two, ragged": lambda: run(mirrored(), rows=7),
    "two, compiled": lambda: run(mirrored(), jit_compile=True),
    "one, half": lambda: run(tf.distribute.get_strategy(), dtype="mixed_float16"),
    "two, half": lambda: run(mirrored(), dtype="mixed_float16"),
    "two, in bfloat16": lambda: run(mirrored(), all_reduce_dtype="bfloat16"),
    "two, in float16 and compiled": lambda: run(mirrored(), all_reduce_dtype="float16", jit_compile=True),
    "two, ragged and compiled": lambda: run(mirrored(), rows=7, jit_compile=True),
    "two, half and compiled": lambda: run(mirrored(), dtype="mixed_float16", jit_compile=True),
    "layers": layers,
    "dropout": dropout,
    "broken": broken_on_one,
    "refused": refused,
}
print(json.dumps({name: runs[name]() for name in sys.argv[1:]}))
