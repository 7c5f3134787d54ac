"""Keras layers: sparse attention, the residual block, the embedding of a sequence."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "stf.layers needs Keras with the TensorFlow backend. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
        "Set KERAS_BACKEND=tensorflow in the environment, or leave it unset."
    )

from stf.layers.attention import SparseAttention
from stf.layers.embeddings import SequenceEmbedding
from stf.layers.fixed_attention import FixedAttention
from stf.layers.initialization import paper_initializer
from stf.layers.residual_block import SparseResidualBlock
from stf.layers.residual_stack import SparseResidualStack
from stf.layers.rotary import RotaryEmbedding
from stf.layers.strided_attention import StridedAttention

__all__ = [
    "FixedAttention",
    "RotaryEmbedding",
    "SequenceEmbedding",
    "SparseAttention",
    "SparseResidualBlock",
    "SparseResidualStack",
    "StridedAttention",
    "paper_initializer",
]
