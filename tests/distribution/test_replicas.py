"""Several replicas: the same losses, averages and accumulation as one, and one verdict on what is not finite."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.distribution.steps import check_all_reduce_dtype

# Virtual devices must be made before TensorFlow starts, so in a process of its own.
PROGRAM = pathlib.Path(__file__).with_name("replicas.py")


FAST = ("dropout", "broken")


@functools.cache
def found(name):
    """What came of a run; those of the fast tests are made in one process."""
    return printed(*FAST if name in FAST else (name,))[name]


@functools.cache
def printed(*names):
    done = subprocess.run([sys.executable, PROGRAM, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "like", "off"),
    [
        pytest.param("two, compiled", "one", 2e-5, marks=pytest.mark.slow),
        pytest.param("one, under a strategy", "one", 2e-5, marks=pytest.mark.slow),
        # A replica may get fewer rows than another, or none.
        pytest.param("two, ragged", "one, ragged", 2e-5, marks=pytest.mark.slow),
        pytest.param("two, ragged and compiled", "one, ragged", 2e-5, marks=pytest.mark.slow),
        pytest.param("two", "one", 2e-5, marks=pytest.mark.slow),
        pytest.param("two, accumulating", "one, accumulating", 2e-5, marks=pytest.mark.slow),
        pytest.param("two, half", "one, half", 2e-3, marks=pytest.mark.slow),
        pytest.param("two, in bfloat16", "one", 2e-3, marks=pytest.mark.slow),
    ],
)
def test_two_replicas_do_what_one_does(kind, like, off):
    np.testing.assert_allclose(found(kind), found(like), rtol=off)


def test_a_step_under_a_strategy_is_compiled_where_there_is_a_gpu(monkeypatch):
    """As without one: Keras' own answer to "auto" is no."""
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [gpu])
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = stf.models.SparseTransformer(8, (8,), [stf.patterns.Local(2)], 1, 1, 8, vocab_size=4)
        model.compile("sgd", stf.training.cross_entropy())
    assert model.jit_compile


def test_what_nccl_cannot_sum_is_refused_by_name():
    with pytest.raises(ValueError, match="Received: all_reduce_dtype='bfloat16'"):
        check_all_reduce_dtype("bfloat16", ["/job:localhost/replica:0/task:0/device:GPU:0"])
    check_all_reduce_dtype("bfloat16", ["/job:localhost/replica:0/task:0/device:CPU:0"])
    check_all_reduce_dtype("float16", ["/job:localhost/replica:0/task:0/device:GPU:0"])


@pytest.mark.slow
def test_layers_in_a_plain_keras_model():
    losses = found("layers")
    assert losses == sorted(losses, reverse=True) and np.isfinite(losses).all()


def test_replicas_drop_differently_and_count_alike():
    found_in, states = found("dropout")
    assert found_in == [[True, False], [True, False]]  # the first as one device, uncompiled and compiled
    assert states[0] == states[1] and states[0][1] == 2


def test_no_replica_takes_a_step_that_is_not_finite_on_one():
    assert found("broken") == [1.0, 1.0, 1.0, 1]
