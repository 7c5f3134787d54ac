"""Keras layers: sparse attention, the residual block around it, and position embeddings."""

from stf.layers.attention import FixedAttention, SparseAttention, StridedAttention
from stf.layers.embeddings import PositionEmbedding, StartShift
from stf.layers.residual_block import SparseResidualBlock

__all__ = [
    "FixedAttention",
    "PositionEmbedding",
    "SparseAttention",
    "SparseResidualBlock",
    "StartShift",
    "StridedAttention",
]
