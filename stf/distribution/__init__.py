"""Training on several GPUs and machines, by tf.distribute."""

from stf.distribution.steps import ReplicatedTrainer

__all__ = ["ReplicatedTrainer"]
