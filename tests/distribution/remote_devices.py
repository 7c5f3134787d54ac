"""Sequences shared by the CPUs of two processes: prints the losses of `fit` on both, and on the first alone, as JSON.

python remote_devices.py PORT PORT serve     # the second process, until it is killed
python remote_devices.py PORT PORT train     # the first
"""

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import stf

P = stf.patterns
TOKENS = np.random.default_rng(0).integers(0, 16, (8, 96)).astype("int32")


def fit(strategy):
    with strategy.scope():
        model = stf.models.SparseTransformer(
            96, (12, 8), [P.Local(8), P.Strided(8), P.Fixed(8, 4)], 3, 2, 16, vocab_size=16, seed=1, recompute=True
        )
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy(), jit_compile=False)
    return model.fit(TOKENS, TOKENS, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]


def main():
    *ports, role = sys.argv[1:]
    cluster = tf.train.ClusterSpec({"worker": [f"127.0.0.1:{port}" for port in ports]})
    if role == "serve":
        tf.distribute.Server(cluster, job_name="worker", task_index=1).join()
    tf.config.experimental_connect_to_cluster(cluster, job_name="worker", task_index=0)
    devices = [f"/job:worker/replica:0/task:{task}/device:CPU:0" for task in range(2)]
    strategies = stf.distribution.SequenceParallel(devices=devices), tf.distribute.OneDeviceStrategy(devices[0])
    print(json.dumps([fit(strategy) for strategy in strategies]))


if __name__ == "__main__":
    main()
