"""Runs that are stopped, taken up again, refused and broken."""

import json
import os
import re
import signal
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from stf.callbacks import Checkpoint, CheckpointError, StopOnSignal, load_checkpoint
from stf.experiments import RunError, run
from stf.experiments.run import _fits
from stf.models import SparseTransformer
from stf.patterns import Local, Strided
from stf.training import BitsPerDim, WarmupCosine, cross_entropy, optimizer, steps_taken

TOKENS = np.random.default_rng(0).integers(0, 16, (32, 24)).astype(np.int32)


def make_model(schedule=1e-2, **arguments):
    model = SparseTransformer(24, (4, 6), [Local(6), Strided(6)], 2, 2, 8, vocab_size=16, dropout=0.2, seed=1)
    model.compile(optimizer(schedule, **arguments), cross_entropy(), metrics=[BitsPerDim()])
    return model


def train(done, shard=(0, 1)):
    batches = tf.data.Dataset.from_tensor_slices(TOKENS).batch(4, drop_remainder=True).repeat().skip(done)
    return batches.map(lambda batch: (batch, batch))


def small_run(run_dir, steps=6, epochs=3, make=make_model, **options):
    return run(make, train, lambda shard: train(0).take(2), run_dir, steps, epochs, **options)


class SignalAt(keras.callbacks.Callback):
    """Sends a signal to this process at a moment of a run."""

    def __init__(self, number, step=None, validation=False):
        super().__init__()
        self.number, self.step, self.validation = number, step, validation

    def on_train_batch_begin(self, batch, logs=None):
        if self.step == steps_taken(self.model.optimizer):
            self.step = None
            os.kill(os.getpid(), self.number)

    def on_test_batch_begin(self, batch, logs=None):
        if self.validation:
            self.validation = False
            os.kill(os.getpid(), self.number)


class Fails(keras.callbacks.Callback):
    """Ends a run before its first step."""

    def on_train_batch_begin(self, batch, logs=None):
        raise KeyError


def test_a_run_is_not_overwritten_unless_it_is_asked_for(tmp_path):
    with pytest.raises(RunError, match=f"no checkpoint in {tmp_path / 'run'} to resume from"):
        small_run(tmp_path / "run", resume=True)
    first = small_run(tmp_path / "run").get_weights()
    before = (tmp_path / "run" / "checkpoint.keras").read_bytes()
    with pytest.raises(RunError, match=rf"{tmp_path / 'run'} has the checkpoint .*--resume .*--overwrite"):
        small_run(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.keras").read_bytes() == before
    again = small_run(tmp_path / "run", overwrite=True).get_weights()
    assert all(map(np.array_equal, first, again))
    with pytest.raises(KeyError):
        small_run(tmp_path / "run", overwrite=True, callbacks=[Fails()])
    with pytest.raises(RunError, match="no checkpoint"):  # what was overwritten is nobody's to resume
        small_run(tmp_path / "run", resume=True)


def test_other_settings_are_refused_by_name(tmp_path):
    small_run(tmp_path, settings={"batch_size": 4, "preset": "a", "shape": (4, 6)})
    with pytest.raises(RunError, match="batch_size was 4, is 8; policy was not set, is 'float16'") as error:
        small_run(
            tmp_path, resume=True, settings={"batch_size": 8, "preset": "a", "shape": [4, 6], "policy": "float16"}
        )
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="steps were 6, are 5"):
        small_run(tmp_path, steps=5, resume=True, settings={"batch_size": 4, "preset": "a", "shape": (4, 6)})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        small_run(tmp_path, resume=True)


def test_more_steps_go_on_along_the_longer_schedule(tmp_path, capsys):
    schedules = {steps: WarmupCosine(1e-2, steps, 2) for steps in (6, 12)}
    small_run(tmp_path, make=lambda: make_model(schedules[6]))
    with pytest.raises(RunError, match="started with 6 steps, and nothing says"):
        small_run(tmp_path, steps=12, resume=True)
    with pytest.raises(KeyError):  # before its first checkpoint
        small_run(tmp_path, steps=12, resume=True, schedule=schedules[12], callbacks=[Fails()])
    assert "6 steps are now 12" in capsys.readouterr().out
    model = small_run(tmp_path, steps=12, resume=True, schedule=schedules[12])
    assert steps_taken(model.optimizer) == 12
    assert model.optimizer.get_config()["learning_rate"]["config"]["total_steps"] == 12
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 12
    moved = np.abs(model.get_weights()[0] - make_model().get_weights()[0]).max()
    assert moved > 0 and float(schedules[12](8)) > 0


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("SIGTERM", dict(step=3)),
        pytest.param("SIGINT", dict(step=0), marks=pytest.mark.slow),
        pytest.param("SIGTERM", dict(step=5), marks=pytest.mark.slow),
        pytest.param("SIGINT", dict(validation=True), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_a_signal_stops_ends_bit_for_bit(name, moment, tmp_path, capsys):
    def make():
        return make_model(average=0.9, accumulation_steps=2)

    options = dict(steps=11, epochs=3, make=make)  # epochs of 3, 3 and 5 steps
    whole = small_run(tmp_path / "whole", **options)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        small_run(tmp_path / "stopped", callbacks=[SignalAt(getattr(signal, name), **moment)], **options)
    assert stopped.value.code == 128 + getattr(signal, name)
    assert signal.getsignal(signal.SIGTERM) is handler
    taken = 3 if "validation" in moment else moment["step"] + 1
    assert f"stopped by {name} after step {taken}; --resume goes on from" in capsys.readouterr().out
    resumed = small_run(tmp_path / "stopped", resume=True, **options)
    assert f"after step {taken}" in capsys.readouterr().out
    assert steps_taken(resumed.optimizer) == steps_taken(whole.optimizer) == 11
    for a, b in zip(*(m.variables + m.optimizer.variables for m in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=b.path)


def test_any_optimizer_will_do(tmp_path):
    def make():
        model = make_model()
        model.compile(keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.5), cross_entropy())
        return model

    whole = small_run(tmp_path / "whole", make=make).get_weights()
    with pytest.raises(SystemExit):
        small_run(tmp_path / "stopped", make=make, callbacks=[SignalAt(signal.SIGTERM, step=2)])
    resumed = small_run(tmp_path / "stopped", make=make, resume=True).get_weights()
    assert all(map(np.array_equal, whole, resumed))


def test_a_run_that_was_done_is_given_again(tmp_path):
    options = dict(make=lambda: make_model(average=0.9))
    done = small_run(tmp_path, **options).get_weights()
    assert all(map(np.array_equal, done, small_run(tmp_path, resume=True, **options).get_weights()))


def test_all_steps_are_taken_whatever_their_epochs():
    assert _fits(0, 12, 3) == [(0, 3, 4)]
    assert _fits(4, 12, 3) == [(1, 2, 4)]
    assert _fits(5, 12, 3) == [(1, 1, 3), (2, 1, 4)]
    assert _fits(0, 11, 3) == [(0, 2, 3), (2, 1, 5)]
    assert _fits(12, 12, 3) == []
    for steps in range(1, 30):
        for epochs in range(1, steps + 1):
            for done in range(steps + 1):
                assert done + sum(count * length for _, count, length in _fits(done, steps, epochs)) == steps


def test_a_checkpoint_by_time_and_the_one_before_it(tmp_path):
    class Watch(keras.callbacks.Callback):
        seen = 0

        def on_train_batch_begin(self, batch, logs=None):
            deadline = time.time() + 60
            while batch == 1 and not Watch.seen and time.time() < deadline:
                Watch.seen += (tmp_path / "checkpoint.keras").exists()

    small_run(tmp_path, steps=2, epochs=1, callbacks=[Watch()], checkpoint_minutes=1e-9)
    assert Watch.seen == 1  # within the epoch
    assert sorted(p.name for p in tmp_path.glob("*.keras")) == ["checkpoint.keras", "checkpoint.previous.keras"]


def test_a_broken_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys):
    small_run(tmp_path, steps=4, epochs=2)
    path = tmp_path / "checkpoint.keras"
    path.write_bytes(path.read_bytes()[:1000])
    small_run(tmp_path, steps=4, epochs=2, resume=True)
    out = capsys.readouterr().out
    assert f"{path} is no whole checkpoint" in out and "after step 2" in out
    assert (tmp_path / "checkpoint.broken.keras").stat().st_size == 1000  # not where the one before it is kept
    for name in ("checkpoint.keras", "checkpoint.previous.keras"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="checkpoint.keras is no whole checkpoint.*previous.*--overwrite"
    ) as error:
        small_run(tmp_path, steps=4, epochs=2, resume=True)
    assert "\n" not in str(error.value)


def test_a_full_disk_costs_the_new_checkpoint_alone(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "checkpoint.keras")
    checkpoint.set_model(make_model())
    checkpoint.save()
    checkpoint.wait()
    before = checkpoint.path.read_bytes()

    def save(_, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SparseTransformer, "save", save)
    checkpoint.save()
    with pytest.raises(CheckpointError, match=f"{checkpoint.path} could not be written: .*No space left"):
        checkpoint.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.keras"] and checkpoint.path.read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/run/run\.json could not be written"):
        small_run(tmp_path / "file" / "run")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, capsys, monkeypatch):
    """What is on disk is the state of the moment, whatever was trained while it was written."""
    whole = small_run(tmp_path / "whole", steps=4, epochs=2)
    save = SparseTransformer.save

    def slowly(model, path):
        time.sleep(0.3)
        save(model, path)

    monkeypatch.setattr(SparseTransformer, "save", slowly)
    small_run(tmp_path / "run", steps=4, epochs=2)
    said = re.findall(r"checkpoints: 2 written to (.*); of each, training waited ([\d.]+) s", capsys.readouterr().out)
    assert said[-1][0] == str(tmp_path / "run" / "checkpoint.keras")
    model = load_checkpoint(tmp_path / "run" / "checkpoint.previous.keras")
    assert steps_taken(model.optimizer) == 2
    (tmp_path / "run" / "checkpoint.keras").unlink()
    resumed = small_run(tmp_path / "run", steps=4, epochs=2, resume=True)
    for a, b in zip(*(m.variables + m.optimizer.variables for m in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=b.path)


@pytest.mark.parametrize(
    ("part", "says"), [("config", "describes .* parameters, its weights have"), ("weights", "its")]
)
def test_a_checkpoint_whose_parts_are_not_of_one_size_is_refused_at_once(part, says, tmp_path):
    small_run(tmp_path / "run", steps=2, epochs=1)
    path = tmp_path / "run" / "checkpoint.keras"
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    if part == "config":
        config = json.loads(parts["config.json"])
        config["config"]["num_blocks"] = 10**9
        parts["config.json"] = json.dumps(config)
    else:
        parts["model.weights.h5"] = bytes(10**8)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(path)
    assert time.monotonic() - begin < 5


def test_a_signal_after_another_workers_is_not_a_second_one():
    handler = signal.getsignal(signal.SIGTERM)
    with StopOnSignal() as stop:
        stop.set_model(make_model())
        stop._stop()  # as another worker's makes it
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_disk_that_does_not_answer_is_not_taken_for_a_broken_checkpoint(tmp_path, monkeypatch):
    small_run(tmp_path, steps=4, epochs=2)

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(keras.saving, "load_model", fail)
    with pytest.raises(CheckpointError, match=r"checkpoint\.keras could not be read: .*Input/output error"):
        small_run(tmp_path, steps=4, epochs=2, resume=True)
    assert (tmp_path / "checkpoint.keras").exists()


def test_what_is_overwritten_is_moved_aside(tmp_path):
    small_run(tmp_path, steps=2, epochs=1)
    before = (tmp_path / "checkpoint.keras").read_bytes()
    small_run(tmp_path, steps=2, epochs=1, overwrite=True)
    assert (tmp_path / "checkpoint.overwritten.keras").read_bytes() == before
    # All that a first write leaves when it is killed.
    (tmp_path / "checkpoint.keras").replace(tmp_path / "checkpoint.new.keras")
    (tmp_path / "checkpoint.previous.keras").unlink(missing_ok=True)
    small_run(tmp_path, steps=2, epochs=1)
