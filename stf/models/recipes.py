"""How the models of `stf.models.PRESETS` are trained. Behind each value stands where it is from.

P: the paper. F: the authors' follow-up code. D: derived from their numbers. C: chosen here.

Common to all: Adam, linear warm-up, a cosine to 0, gradients clipped to a global norm of 1 (P); beta_2 0.999 (F). Given
nowhere, so Keras' own: Adam's epsilon, 1e-7.
"""

import copy
from typing import Any

from stf.models.presets import PRESETS

_PAPER = {
    "warmup_steps": 5_000,  # P
    "weight_decay": 0.01,  # P
    "average": 0.999,  # F: a moving average of the weights, to evaluate and sample with
    "policy": "mixed_bfloat16",  # C: P has float16 with loss scaling, which "mixed_float16" is; bfloat16 needs none
}
_CIFAR10 = _PAPER | {
    "batch_size": 16,  # F
    "learning_rate": 0.00035,  # P
    "epochs": 120,  # P
    "steps": 360_000,  # D: 120 epochs of 48,000 images, 16 a step
}
_ENWIK8 = _PAPER | {
    "batch_size": 4,  # C
    "learning_rate": 0.00035,  # C: as CIFAR-10's
    "epochs": 80,  # P
    "steps": 146_484,  # D: 80 epochs of 90,000,000 bytes, 4 x 12,288 a step
}
_IMAGENET64 = _PAPER | {
    "batch_size": 128,  # F
    "learning_rate": 0.00015,  # F
    "epochs": 70,  # P
    "steps": 700_630,  # D: 70 epochs of 1,281,149 images, 128 a step, 10,009 steps an epoch
}
_AUDIO = _PAPER | {
    "batch_size": 1,  # C
    "learning_rate": 0.00035,  # C: as CIFAR-10's
    "epochs": 100,  # C
    "steps": 400_000,  # C
}
# Trains on two CPU cores within minutes. All C, but for the decay, P.
_SMALL = {
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "average": None,
    "policy": "float32",
    "learning_rate": 6e-3,
    "epochs": 4,
}

RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": _CIFAR10,
    "cifar10-dense": _CIFAR10,
    "cifar10-fixed": _CIFAR10,
    "cifar10-augmented": _CIFAR10,
    "cifar10-released": _CIFAR10
    | {
        "warmup_steps": 15_000,  # F
        "epochs": 140,  # F
        "steps": 420_000,  # D: 140 epochs of 48,000 images, 16 a step
    },
    "cifar10-small": _SMALL | {"batch_size": 4, "steps": 1_800},
    "enwik8": _ENWIK8,
    "enwik8-dense": _ENWIK8,
    "enwik8-strided": _ENWIK8,
    "enwik8-windows": _ENWIK8,
    "enwik8-small": _SMALL | {"batch_size": 8, "steps": 1_000},
    "imagenet64": _IMAGENET64,
    "imagenet64-96": _IMAGENET64,
    "imagenet64-small": _SMALL | {"batch_size": 1, "steps": 400},
    "audio-65k": _AUDIO,
    "audio-262k": _AUDIO,
    "audio-1m": _AUDIO,
    "audio-small": _SMALL | {"batch_size": 2, "steps": 600},
}
assert RECIPES.keys() == PRESETS.keys()


def recipe(name: str) -> dict[str, Any]:
    """How the model of a preset is trained, as a fresh dictionary.

    Returns:
        `batch_size` (over all GPUs), `steps`, `epochs`, `learning_rate` (the peak), `warmup_steps`, `weight_decay`,
        `average` (momentum, or None), and `policy`, a Keras dtype policy.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in RECIPES:
        raise ValueError(f"preset must be one of {sorted(RECIPES)}. Received: preset={name!r}")
    return copy.deepcopy(RECIPES[name])
