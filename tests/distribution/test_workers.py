"""Two processes that train one model: what one does, stopped, killed, and resumed; and what is refused."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from stf.experiments import RunError, make_strategy

WORKER = pathlib.Path(__file__).with_name("worker.py")


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def config(workers, index):
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})


def begin(workers, index, *arguments, program=(str(WORKER),)):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_CONFIG": config(workers, index) if workers else ""}
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def cluster(*arguments, count=2, **options):
    """The processes of a cluster on this machine."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(count)]
    return [begin(workers, index, *arguments, **options) for index in range(count)]


def ended(processes, code=0, seconds=240):
    """What each printed, once all have ended."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n---\n".join(said)
    return said


def weights(said):
    return float(re.search(r"weights ([\d.]+) of", said).group(1))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, and what it printed."""
    folder = tmp_path_factory.mktemp("alone")
    [said] = ended([begin(None, 0, folder, 20)])
    return folder, said


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The run of two processes, and what both printed."""
    folder = tmp_path_factory.mktemp("together")
    return folder, *ended(cluster(folder, 20))


def variables(folder):
    model = keras.saving.load_model(folder / "checkpoint.keras")
    return [np.array(variable) for variable in model.variables + model.optimizer.variables]


def losses(said):
    """Of each epoch, as the progress bar last says it."""
    return [float(x) for x in re.findall(r"val_loss: ([\d.]+)", said)]


def test_two_workers_do_what_one_does(alone, together):
    (folder, whole), (other, first, second) = alone, together
    assert "on 2 devices of 2 machines" in first and "Epoch" in first and "Epoch" not in second
    assert weights(first) == weights(second) == pytest.approx(weights(whole), rel=1e-6)
    for one, two in zip(variables(folder), variables(other), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses(first), losses(whole), rtol=1e-4)


def wait_for(condition, processes, seconds=200):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    assert condition(), "\n---\n".join(process.communicate(timeout=20)[0] for process in processes)


def test_a_killed_worker_ends_the_run_in_a_line_and_all_resume_to_the_same_bits(together, tmp_path):
    whole, folder = together[1], tmp_path / "killed"
    processes = cluster(folder, 20, "--slow")
    wait_for((folder / "checkpoint.keras").exists, processes)
    processes[1].kill()
    [said] = ended(processes[:1], code=1, seconds=120)
    assert "Traceback" not in said and "A worker of the cluster no longer answers" in said and "--resume" in said
    first, second = ended(cluster(folder, 20, "--resume"))
    assert "resuming" in first
    assert weights(first) == weights(second) == weights(whole)


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_after_the_same_step(tmp_path):
    processes = cluster(tmp_path, 40, "--slow")
    wait_for((tmp_path / "run.json").exists, processes)
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes, code=128 + signal.SIGTERM)
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", first).group(1))
    assert "another worker stops" in first and "Traceback" not in first + second
    resumed, _ = ended(cluster(tmp_path, 40, "--resume"))
    assert f"after step {stopped}" in resumed and "of 40 steps" in resumed


def test_a_worker_too_many_is_refused_by_name():
    with pytest.raises(RunError, match="worker 2 is not one of its 2 workers, 0 to 1. Received: TF_CONFIG="):
        make_strategy({"TF_CONFIG": config(["a:1", "b:1"], 2)})
    for broken in ("{", "[]", "{}", json.dumps({"cluster": {"worker": ["a:1"]}}), config(["a:1", "a:1"], 0)):
        with pytest.raises(RunError, match="TF_CONFIG does not describe a cluster with this process in it"):
            make_strategy({"TF_CONFIG": broken})


PLAIN_KERAS = """
import numpy as np, tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras
with strategy.scope():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
model.fit(np.zeros((8, 3), "float32"), np.zeros((8, 1), "float32"), batch_size=4, verbose=0)
"""


@pytest.mark.slow
def test_plain_keras_fails_where_ours_does_not():
    """Once it does not, stf.distribution.steps has less to do."""
    processes = cluster(program=("-c", PLAIN_KERAS))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert any("PerReplica" in text or "axis" in text for text in said), said
