"""The types of signatures that several modules share."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

# What TensorFlow takes for a tensor: tensors, variables, arrays, numbers, lists of them; Keras' symbolic ones too.
TensorLike: TypeAlias = tf.types.experimental.TensorLike | keras.KerasTensor
# A tensor's shape: of ints, and None where a size is known later.
Shape: TypeAlias = tuple[Any, ...]
PathLike: TypeAlias = str | os.PathLike[str]
# What Keras' `get` of each kind takes: a name, a config, an object or a function.
Initializer: TypeAlias = str | dict[str, Any] | keras.initializers.Initializer | Callable[..., Any]
Regularizer: TypeAlias = str | dict[str, Any] | keras.regularizers.Regularizer | Callable[..., Any] | None
Constraint: TypeAlias = str | dict[str, Any] | keras.constraints.Constraint | Callable[..., Any] | None
# Metrics by name, as Keras gives them to callbacks.
Logs: TypeAlias = dict[str, Any] | None
