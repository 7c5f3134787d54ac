"""One position through a stack of residual blocks as one op of the GPU, beside caches that it writes in place."""

import itertools
from typing import TYPE_CHECKING

import tensorflow as tf

from stf.ops import library
from stf.ops.residual_stack import runs_on_a_gpu

if TYPE_CHECKING:
    from stf.layers.block import BlockWeights

DTYPES = (tf.float32, tf.bfloat16, tf.float16)
MOST_DEPTH, MOST_PARTS, MOST_PROGRAMS, MOST_PATTERNS, VECTOR = 256, 48, 48, 16, 8  # decode.h says them too


def runs_residual_stack_decode(
    dtype: tf.DType, cache_dtype: tf.DType, sizes: tuple[int, ...], part_reads: list[list[list[int]]]
) -> bool:
    """Whether `residual_stack_decode` takes a stack of these sizes here: in a function for a GPU.

    That XLA compiles the function is the caller's to know.

    Args:
        dtype: of the stack.
        cache_dtype: of keys and values: the stack's or float32.
        sizes: model_dim, units of the feed-forward layers, key and value depth: multiples of 8, depths up to 256.
        part_reads: see `residual_stack_decode`.
    """
    programs = list(itertools.chain(*part_reads))
    return (
        dtype in DTYPES
        and cache_dtype in (dtype, tf.float32)
        and all(size % VECTOR == 0 for size in sizes)
        and max(sizes[2:]) <= MOST_DEPTH
        and len(part_reads) <= MOST_PATTERNS
        and len(programs) <= MOST_PROGRAMS
        and sum(map(len, programs)) <= MOST_PARTS
        and not tf.executing_eagerly()
        and runs_on_a_gpu()
    )


def residual_stack_decode(
    inputs: tf.Tensor,
    weights: "BlockWeights",
    part_reads: list[list[list[int]]],
    reads: tf.Tensor,
    writes: tf.Tensor,
    keys: list[tf.Tensor],
    values: list[tf.Tensor],
    num_heads: int,
    key_dim: int,
    epsilon: float,
) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
    """One position of every sequence through residual blocks (Child et al. 2019, Eqs. 11-14). Has no gradient.

    For functions that XLA compiles for a GPU, where it is one kernel and the caches are written where they are. A cache
    has parts, each with the keys and values of the heads of one program of one pattern, for all blocks that run it.

    Args:
        inputs: the stream, `[batch, model_dim]`.
        weights: `stf.layers.block.BlockWeights` of tensors `[block, ...]`; kernels in the inputs' dtype.
        part_reads: for each pattern that blocks take in turn, for each of its programs, how many of `reads` are each
            part's. Head h runs the program h modulo the number of them.
        reads: int32: for all parts, one behind another, the slots that the position attends to, its own among them;
            -1: none. Numbers must be below the part's slots: where they lie, nothing can check it.
        writes: int32 `[part]`, the slot that the position's key and value go to; -1: none.
        keys: of each part `[layer * slot, batch, head of the program, key_dim]`, in the inputs' dtype or float32.
        values: the same, with the depth of values.
        num_heads: heads of the attentions.
        key_dim: depth of a head's query and key.
        epsilon: added to the variances of normalizations.

    Returns:
        The stream behind the last block; the keys; the values.
    """
    first_program, first_part = [0], [0]
    for programs in part_reads:
        for parts in programs:
            first_part.append(first_part[-1] + len(parts))
        first_program.append(len(first_part) - 1)
    cache_dtype = {"C": inputs.dtype} if not keys else {}
    return library.load().stf_residual_stack_decode(
        inputs,
        *(tf.cast(x, inputs.dtype if x.shape.rank == 3 else tf.float32) for x in weights),
        reads,
        writes,
        keys,
        values,
        num_heads=num_heads,
        key_depth=key_dim,
        epsilon=epsilon,
        scale=key_dim**-0.5,
        first_program=first_program,
        first_part=first_part,
        part_reads=list(itertools.chain(*itertools.chain(*part_reads))),
        **cache_dtype,
    )
