"""stf: Sparse Transformers for TensorFlow and Keras 3.

Long-sequence attention whose cost grows as n sqrt(n) (Child et al. 2019, arXiv 1904.10509): patterns,
a custom op, Keras layers and a Keras model. Parts load when they are first used, so that
`stf.patterns` needs NumPy alone.
"""

import importlib

from stf.version import __version__

_PARTS = (
    "callbacks",
    "data",
    "generation",
    "layers",
    "models",
    "ops",
    "patterns",
    "training",
)

__all__ = ["__version__", *_PARTS]


def __getattr__(name):
    if name in _PARTS:
        return importlib.import_module(f"stf.{name}")
    raise AttributeError(f"module 'stf' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
