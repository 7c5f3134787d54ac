"""stf: Sparse Transformers for TensorFlow and Keras 3.

Long-sequence attention whose cost grows as n sqrt(n) (Child et al. 2019, arXiv 1904.10509): patterns,
a custom op, Keras layers and a Keras model. Importing stf registers its Keras classes, so that
`keras.saving.load_model` finds them; the op library loads when an op is first called, data sets and
callbacks when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from stf import patterns, xla
from stf.version import __version__

xla.set_flags()  # before anything is compiled

from stf import ops, layers, training, models, generation  # noqa: E402 isort: skip

_LATER = ("callbacks", "data", "distribution", "evaluation", "experiments")

__all__ = [
    "__version__",
    "callbacks",
    "data",
    "distribution",
    "evaluation",
    "experiments",
    "generation",
    "layers",
    "models",
    "ops",
    "patterns",
    "training",
    "xla",
]


if TYPE_CHECKING:
    from stf import callbacks, data, distribution, evaluation, experiments
else:

    def __getattr__(name):
        if name in _LATER:
            return importlib.import_module(f"stf.{name}")
        raise AttributeError(f"module 'stf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
