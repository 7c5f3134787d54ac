"""Several replicas: the same losses, averages and accumulation as one, and one verdict on what is not finite."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

# Virtual devices must be made before TensorFlow starts, so in a process of its own.
PROGRAM = pathlib.Path(__file__).with_name("replicas.py")


@functools.cache
def found(*names):
    done = subprocess.run([sys.executable, PROGRAM, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "like", "off"),
    [
        ("two, compiled", "one", 2e-5),
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
    np.testing.assert_allclose(found(kind)[kind], found(like)[like], rtol=off)


@pytest.mark.slow
def test_layers_in_a_plain_keras_model():
    losses = found("layers")["layers"]
    assert losses == sorted(losses, reverse=True) and np.isfinite(losses).all()


def test_replicas_drop_differently_and_count_alike():
    found_in, states = found("dropout")["dropout"]
    assert found_in == [[True, False], [True, False]]  # the first as one device, uncompiled and compiled
    assert states[0] == states[1] and states[0][1] == 2


def test_no_replica_takes_a_step_that_is_not_finite_on_one():
    assert found("broken")["broken"] == [1.0, 1.0, 1.0, 1]
