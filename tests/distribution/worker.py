"""A small run as a process: alone, or as one of the workers that TF_CONFIG names.

    python worker.py RUN_DIR STEPS [--resume] [--slow] [--batch=N]

Prints what `stf.experiments.run` prints, and on every worker the sum of its weights' sizes.
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import stf

TOKENS = np.random.default_rng(0).integers(0, 16, (30, 24)).astype(np.uint8)


class Slow(keras.callbacks.Callback):
    """Leaves time for signals."""

    def on_train_batch_end(self, batch, logs=None):
        print(f"batch {batch}", flush=True)
        time.sleep(0.1)


def make_model(steps):
    patterns = [stf.patterns.Local(6), stf.patterns.Strided(6)]
    model = stf.models.SparseTransformer(24, (4, 6), patterns, 2, 2, 8, vocab_size=16, seed=1)
    model.compile(
        stf.training.optimizer(stf.training.WarmupCosine(1e-2, steps, 2), average=0.9),
        stf.training.cross_entropy(),
        weighted_metrics=[stf.training.BitsPerDim()],
    )
    return model


def main():
    run_dir, steps, *flags = sys.argv[1:]
    strategy = stf.experiments.make_strategy()
    model = stf.experiments.run(
        lambda: make_model(int(steps)),
        lambda done, shard: stf.data.batches(TOKENS, 6, 3, done, shard),
        lambda shard: stf.data.batches(TOKENS[:10], 6, shard=shard),  # whose last batch is not whole
        run_dir,
        int(steps),
        2,
        resume="--resume" in flags,
        callbacks=[Slow()] if "--slow" in flags else [],
        strategy=strategy,
    )
    size = sum(float(np.abs(np.array(tf.convert_to_tensor(w))).sum()) for w in model.trainable_variables)
    print(f"weights {size!r} of {stf.training.steps_taken(model.optimizer)} steps", flush=True)


if __name__ == "__main__":
    import logging

    from stf.experiments import start

    logging.disable(logging.WARNING)
    start(lambda _: main(), sys.argv[:1])
