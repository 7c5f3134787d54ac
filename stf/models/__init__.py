"""The Sparse Transformer as a Keras model, and the paper's configurations of it."""

from stf.models.presets import PRESETS, count_parameters, preset
from stf.models.recipes import RECIPES, recipe
from stf.models.sparse_transformer import SparseTransformer

__all__ = ["PRESETS", "RECIPES", "SparseTransformer", "count_parameters", "preset", "recipe"]
