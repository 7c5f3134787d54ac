"""Several replicas: the same losses, averages and accumulation as one, and one verdict on what is not finite."""

import json
import subprocess
import sys

import numpy as np
import pytest

# Virtual devices must be made before TensorFlow starts, so in a process of its own.
PROGRAM = """
import json, sys, tempfile
import keras, numpy as np, tensorflow as tf
[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import stf
from stf.callbacks import Checkpoint, MovingAverage, StopOnNonFinite, TrainingLog

x = np.random.default_rng(0).integers(0, 11, (8, 24)).astype("int32")

def run(devices, **options):
    keras.utils.set_random_seed(0)
    with tf.distribute.MirroredStrategy(devices).scope() if devices else tf.distribute.get_strategy().scope():
        patterns = [stf.patterns.Local(4), stf.patterns.Strided(4)]
        model = stf.models.SparseTransformer(24, (6, 4), patterns, 3, 2, 16, vocab_size=11, seed=1, recompute=True)
        model.compile(
            stf.training.optimizer(1e-2, average=0.9, **options),
            stf.training.cross_entropy(),
            metrics=[stf.training.BitsPerDim()],
        )
    folder = tempfile.mkdtemp()
    callbacks = [TrainingLog(folder, every=1), StopOnNonFinite(), MovingAverage(), Checkpoint(folder + "/c.keras")]
    history = model.fit(
        x, x, batch_size=4, epochs=3, shuffle=False, verbose=0, validation_data=(x, x), callbacks=callbacks
    ).history
    weights = sum(float(np.abs(np.array(tf.convert_to_tensor(w))).sum()) for w in model.trainable_variables)
    return history["loss"] + history["bits_per_dim"] + history["val_loss"] + [weights]

def broken_on_one(devices):
    strategy = tf.distribute.MirroredStrategy(devices)
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

two = ["CPU:0", "CPU:1"]
runs = {
    "one": lambda: run(None), "two": lambda: run(two),
    "one, accumulating": lambda: run(None, accumulation_steps=2),
    "two, accumulating": lambda: run(two, accumulation_steps=2),
    "broken": lambda: broken_on_one(two),
}
print(json.dumps({name: runs[name]() for name in sys.argv[1:]}))
"""


def found(*names):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", [pytest.param("", marks=pytest.mark.slow), ", accumulating"])
def test_two_replicas_do_what_one_does(kind):
    one, two = found(f"one{kind}", f"two{kind}").values()
    np.testing.assert_allclose(two, one, rtol=2e-5)


def test_no_replica_takes_a_step_that_is_not_finite_on_one():
    assert found("broken")["broken"] == [1.0, 1.0, 1.0, 1]
