"""The paper's recipe as Keras objects (Child et al. 2019, Section 6)."""

from stf.training.loss_scale import LossScale
from stf.training.losses import BitsPerDim, cross_entropy
from stf.training.optimizer import AdamW, averages, optimizer, steps_taken, use_average
from stf.training.schedule import WarmupCosine

__all__ = [
    "AdamW",
    "BitsPerDim",
    "LossScale",
    "WarmupCosine",
    "averages",
    "cross_entropy",
    "optimizer",
    "steps_taken",
    "use_average",
]
