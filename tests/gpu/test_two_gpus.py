"""Two GPUs of one machine: what one does, compiled in each replica, the same on both."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.gpu
if len(tf.config.list_physical_devices("GPU")) < 2:
    pytest.skip("no two GPUs", allow_module_level=True)

PROGRAM = pathlib.Path(__file__).parents[1] / "distribution" / "replicas.py"
SHARED = PROGRAM.with_name("sequence_parallel.py")


NAMES = {
    "two, compiled": ("one", 1e-4),
    "two, ragged and compiled": ("one, ragged", 1e-4),
    "two, half and compiled": ("one, half", 5e-3),
    # On two CPUs float16 sums move them by 3.6e-5, beside 1e-4 of the devices.
    "two, in float16 and compiled": ("one", 2e-4),
}


@functools.cache
def found():
    """What came of all runs, by name, made in one process."""
    environment = {**os.environ, "STF_DEVICES": "GPU:0,GPU:1", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    likes = dict.fromkeys(like for like, _ in NAMES.values())
    command = [sys.executable, PROGRAM, *NAMES, *likes, "dropout", "broken", "refused"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", NAMES)
def test_two_gpus_do_what_one_does(kind):
    like, off = NAMES[kind]
    two, one = found()[kind], found()[like]
    print(kind, np.abs(np.array(two) / one - 1).max())
    np.testing.assert_allclose(two, one, rtol=off)


def test_gpus_drop_differently_and_count_alike():
    found_in, states = found()["dropout"]
    assert found_in == [[True, False], [True, False]]
    assert states[0] == states[1] and states[0][1] == 2


def test_no_gpu_takes_a_step_that_is_not_finite_on_one():
    assert found()["broken"] == [1.0, 1.0, 1.0, 1]


def test_what_nccl_cannot_sum_is_refused_by_name():
    assert "all_reduce_dtype='bfloat16'" in found()["refused"]


@pytest.mark.parametrize(
    "name",
    [
        "strided/mixed_bfloat16",
        "strided ragged/mixed_float16",
        "three to one/mixed_bfloat16",
        "attention kept/mixed_bfloat16",
        "strided merged/mixed_bfloat16",
        "fixed/float32",
    ],
)
def test_a_sequence_that_two_gpus_share(name):
    """As on CPUs; in halves one device runs all blocks as one op, and two run an op a block."""
    environment = {**os.environ, "STF_DEVICES": "GPU", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    command = [sys.executable, SHARED, "2", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    alone, apart = row["apart"]
    assert apart <= 1.5 * alone, row
    assert row["same_bits"], row
