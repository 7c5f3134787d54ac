"""A run that is killed at random moments and resumed each time, beside one that is left alone.

    python kills.py FOLDER COUNT SEED

Each attempt is a process of its own, forked from this one before TensorFlow has computed anything. Signals are
SIGKILL, SIGTERM and SIGINT in turn; moments are drawn from the time that an undisturbed attempt takes. Runs are begun
until COUNT signals have found a process alive, and each is resumed to its end. The last line of output is JSON: how
many runs, the signals by name and by what they struck, and which variables differ from the undisturbed run's.
"""

import collections
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import stf

STEPS, EPOCHS = 22, 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Phase(keras.callbacks.Callback):
    """Writes down what the process is about to do."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.begun = False

    def write(self, phase):
        self.path.write_text(phase)

    def on_train_batch_begin(self, batch, logs=None):
        self.write("training" if self.begun else "first step")

    def on_train_batch_end(self, batch, logs=None):
        self.begun = True
        self.write("writing a checkpoint")
        time.sleep(0.03)

    def on_test_batch_begin(self, batch, logs=None):
        self.write("validation")
        time.sleep(0.03)


def run(folder, resume):
    """The run, with all that has a state of its own: dropout, accumulation, an average, float16's loss scale."""
    tokens = np.random.default_rng(0).integers(0, 16, (32, 24)).astype(np.uint8)
    tf.config.threading.set_intra_op_parallelism_threads(1)

    def make_model():
        patterns = [stf.patterns.Local(6), stf.patterns.Strided(6)]
        model = stf.models.SparseTransformer(
            24, (4, 6), patterns, 2, 2, 8, vocab_size=16, dropout=0.2, seed=1, dtype="mixed_float16"
        )
        optimizer = stf.training.optimizer(1e-2, average=0.9, accumulation_steps=2)
        scaled = stf.training.LossScale(optimizer, dynamic_growth_steps=3)
        model.compile(scaled, stf.training.cross_entropy(), weighted_metrics=[stf.training.BitsPerDim()])
        return model

    phase = Phase(folder.parent / f"{folder.name}.phase")
    phase.write("building or loading")
    stf.experiments.run(
        make_model,
        lambda done, shard: stf.data.batches(tokens, 4, 3, done, shard),
        lambda shard: stf.data.batches(tokens[:8], 4, shard=shard),
        folder,
        STEPS,
        EPOCHS,
        resume=resume,
        callbacks=[phase],
        checkpoint_minutes=1e-9,  # after every step
    )


def attempt(folder):
    """A process that begins or resumes the run; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        with open(folder.parent / f"{folder.name}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            run(folder, any(folder.glob("checkpoint*.keras")))
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:  # before training began
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def ended(child, seconds):
    """The status of a process that ends within so many seconds; None of one that does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def finished(folder):
    """Resumes a run to its end, undisturbed."""
    code = ended(attempt(folder), 300)
    if code:
        sys.exit(f"{folder} ended with {code}: {(folder.parent / f'{folder.name}.log').read_text()[-3000:]}")


def differences(folder, other):
    """Names of the variables in which the last checkpoints of two runs differ."""
    one, two = (stf.callbacks.load_checkpoint(path / "checkpoint.keras") for path in (folder, other))
    pairs = zip(*(m.variables + m.optimizer.variables for m in (one, two)), strict=True)
    return [a.path for a, b in pairs if not np.array_equal(a, b)]


def main():
    folder, count, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    whole = folder / "whole"
    begin = time.monotonic()
    finished(whole)
    span = time.monotonic() - begin
    moments = random.Random(seed)
    struck, runs = collections.Counter(), []
    while struck.total() < count:
        runs.append(folder / f"run{len(runs)}")
        alive = True
        while alive and struck.total() < count:
            number = SIGNALS[struck.total() % len(SIGNALS)]
            child = attempt(runs[-1])
            code = ended(child, moments.uniform(0.02, span))
            if code is None:
                phase = (folder / f"{runs[-1].name}.phase").read_text() or "building or loading"
                os.kill(child, number)
                code = ended(child, 120)
                struck[f"{number.name}, {phase}"] += 1
                print(f"{struck.total()} of {count}: {number.name}, {phase}: {code}", flush=True)
                if code not in (0, -number, 128 + number):
                    log = (folder / f"{runs[-1].name}.log").read_text()
                    sys.exit(f"{number.name} while {phase} ended with {code}: {log[-3000:]}")
            elif code:
                sys.exit(f"an attempt ended with {code}: {(folder / f'{runs[-1].name}.log').read_text()[-3000:]}")
            alive = code != 0
        finished(runs[-1])
    unlike = {path.name: found for path in runs if (found := differences(path, whole))}
    print(json.dumps({"runs": len(runs), "kills": struck, "unlike": unlike, "seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
