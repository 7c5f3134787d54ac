"""Named configurations. Behind each value stands where it is from.

P: the paper. F: the authors' follow-up code. D: derived from their numbers. C: chosen here.
"""

import copy

from stf.patterns import Local, Strided

PRESETS = {
    "cifar10": {
        "length": 3072,  # P: 32 x 32 x 3 bytes
        "position_shape": (32, 32, 3),  # P: row, column, channel
        "patterns": [Local(96), Strided(96)],  # P: strided, alternating (Eq. 6); F: l = 96, one image row
        "num_blocks": 128,  # P
        "num_heads": 2,  # P
        "model_dim": 256,  # P
        "key_dim": 64,  # P: half-size, d / 2 over both heads
        "value_dim": 128,  # D: d over both heads
        "ff_dim": 512,  # P: half-size, 2 d
        "dropout": 0.25,  # P
        "recompute": True,  # P
    },
    "cifar10-small": {
        "length": 3072,  # P
        "position_shape": (32, 32, 3),  # P
        "patterns": [Local(96), Strided(96)],  # P, F
        "num_blocks": 2,  # C: trains on two CPU cores within minutes, as all below
        "num_heads": 2,  # P
        "model_dim": 64,  # C
        "key_dim": 16,  # C: half-size as the paper's
        "value_dim": 32,  # C
        "ff_dim": 128,  # C: half-size
        "dropout": 0.0,  # C: too few steps to overfit
        "recompute": False,  # C: memory is no concern
    },
}


def preset(name):
    """The arguments of `SparseTransformer` under a name, as a fresh dictionary."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}. Received: preset={name!r}")
    return copy.deepcopy(PRESETS[name])
