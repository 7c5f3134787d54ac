"""Attention over a sparse pattern: the custom op, its gradient, and the dense reference."""

from stf.ops.attention import attention
from stf.ops.documents import document_bounds
from stf.ops.library import LibraryNotFoundError, is_available, library_path
from stf.ops.packed_attention import packed_attention, packed_attention_gradient
from stf.ops.reference import reference_attention
from stf.ops.residual_stack import residual_stack, runs_on_a_gpu, runs_residual_stack
from stf.ops.residual_stack_decode import residual_stack_decode, runs_residual_stack_decode

__all__ = [
    "LibraryNotFoundError",
    "attention",
    "document_bounds",
    "is_available",
    "library_path",
    "packed_attention",
    "packed_attention_gradient",
    "reference_attention",
    "residual_stack",
    "residual_stack_decode",
    "runs_on_a_gpu",
    "runs_residual_stack",
    "runs_residual_stack_decode",
]

# The op's name is known from here on, where the library loads: tf.saved_model.load needs it.
is_available()
