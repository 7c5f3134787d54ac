"""Training on several GPUs and machines, by tf.distribute."""

from stf.distribution.sequence_parallel import SequenceParallel, SequenceParallelTrainer
from stf.distribution.steps import ReplicatedTrainer

__all__ = ["ReplicatedTrainer", "SequenceParallel", "SequenceParallelTrainer"]
