"""A stack of residual blocks as one op of the GPU: cuBLAS' products, stf's kernels between them, nothing copied.

The op's kernels are those of bfloat16 and float16. Everything else, and every other device, takes TensorFlow's own loop
over the blocks: `stf.layers.residual_loop`.
"""

import contextlib
import ctypes
import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import tensorflow as tf
from tensorflow.python.eager import context as eager_context

from stf.ops import library
from stf.ops.differentiation import differentiable_once
from stf.ops.program import ProgramArguments
from stf.patterns import Kind, Program, lower
from stf.patterns.pattern import Pattern

if TYPE_CHECKING:
    from stf.layers.block import BlockWeights

DTYPES = (tf.bfloat16, tf.float16)
KEEP = {True: 0, "attention": 1, False: 2}  # by what is computed again: `stf_keep` of residual_stack.h
MOST_WIDTH, MOST_DEPTH, VECTOR = 2048, 256, 8


def runs_residual_stack(inputs: tf.Tensor, ff_dim: int, num_heads: int, key_dim: int, value_dim: int) -> bool:
    """Whether `residual_stack` takes a stack of these sizes here: halves, a GPU, and widths that are multiples of 8.

    Args:
        inputs: `[batch, position, model_dim]`, the stream; a width of 2,048 at most.
        ff_dim: width of the feed-forward layers.
        num_heads, key_dim, value_dim: of the attention; depths of 256 at most.
    """
    width = inputs.shape[-1]
    widths = (width, ff_dim, num_heads * value_dim, num_heads * (2 * key_dim + value_dim))
    return (
        inputs.dtype in DTYPES
        and all(size % VECTOR == 0 for size in widths)
        and width <= MOST_WIDTH
        and max(key_dim, value_dim) <= MOST_DEPTH
        and runs_on_a_gpu()
    )


def runs_on_a_gpu() -> bool:
    """Whether what is called here runs on a GPU, and the library has kernels for it."""
    return bool(tf.config.list_logical_devices("GPU")) and not _placed_on_a_cpu() and library.has_cuda()


def _placed_on_a_cpu():
    """Whether `tf.device` says a CPU, around this op or around the call of the function that is being traced."""
    scopes = [eager_context.context().device_name or ""]
    if not tf.executing_eagerly():
        scopes.append(tf.no_op().device)
    return any(tf.DeviceSpec.from_string(scope).device_type == "CPU" for scope in scopes)


class ResidualStack:
    """The op and its gradient op, for whoever keeps what they keep under a gradient of their own.

    Args:
        seed, patterns, num_heads, key_dim, dropout, epsilon, recompute: as `residual_stack` takes them.
        part: length, first, run and step of a `stf.layers.dropout.Part`, where the inputs are a part of the positions.

    Raises:
        LibraryNotFoundError: the op library is missing, or was built without CUDA.
    """

    def __init__(self, seed, patterns, num_heads, key_dim, dropout, epsilon, recompute, part=()):
        if not library.has_cuda():
            raise library.LibraryNotFoundError("stf's op library was built without CUDA: residual_stack needs it.")
        _load_cublas()
        for pattern in patterns:
            pattern.check_heads(num_heads)
        program, first_program = _joint_program(tuple(patterns), num_heads)
        self._seed = tf.zeros([2], tf.int32) if seed is None else seed
        self._attributes = {
            "keep": KEEP[recompute],
            "num_heads": num_heads,
            "key_depth": key_dim,
            "epsilon": epsilon,
            "drop_below": 0 if seed is None else min(round(dropout * 2**32), 2**32 - 1),
            "drop_scale": 1 / (1 - dropout),
            "scale": key_dim**-0.5,
            "first_program": first_program,
            "part": list(part),
            **program.keywords(),
        }

    def forward(self, inputs, weights):
        """The output, and what `backward` takes of it."""
        output, *kept = library.load().stf_residual_stack(inputs, *weights, self._seed, **self._attributes)
        return output, kept

    def backward(self, kept, upstream, weights):
        """The gradients of the inputs and of all weights, a list."""
        return library.load().stf_residual_stack_grad(*kept, upstream, *weights, self._seed, **self._attributes)


def op_weights(weights, dtype):
    """`BlockWeights` as the op takes them for inputs of a dtype: kernels in that, biases in float32."""
    return [tf.cast(x, dtype if x.shape.rank == 3 else tf.float32) for x in weights]


def residual_stack(
    inputs: tf.Tensor,
    weights: "BlockWeights",
    seed: tf.Tensor | None,
    patterns: Sequence[Pattern],
    num_heads: int,
    key_dim: int,
    dropout: float = 0.0,
    epsilon: float = 1e-6,
    recompute: bool | Literal["attention"] = False,
) -> tf.Tensor:
    """Residual blocks one after another (Child et al. 2019, Eqs. 11-14). Differentiable once, the same bits every run.

    Args:
        inputs: H_0, `[batch, position, model_dim]`, bfloat16 or float16.
        weights: `stf.layers.block.BlockWeights` of tensors `[block, ...]`; kernels in the inputs' dtype.
        seed: int32 `[2]` of dropout, or None for none. Block k drops by `seed + [k, 0]` after attention and by
            `seed + [k, 2^30]` after feed-forward: see `stf.layers.dropout`.
        patterns: the patterns that the blocks take in turn.
        num_heads: heads of the attentions.
        key_dim: depth of a head's query and key.
        dropout: its rate.
        epsilon: added to the variances of normalizations.
        recompute: what the gradient computes again: see `stf.layers.SparseResidualStack`.

    Returns:
        H_N, `[batch, position, model_dim]`.

    Raises:
        InvalidArgumentError: for shapes that do not fit; names the argument.
        LibraryNotFoundError: the op library is missing, or was built without CUDA.
    """
    stack = ResidualStack(seed, patterns, num_heads, key_dim, dropout, epsilon, recompute)
    run = differentiable_once(
        lambda inputs, *weights: stack.forward(inputs, weights),
        lambda kept, upstream, _, *weights: stack.backward(kept, upstream, weights),
    )
    return run(inputs, *op_weights(weights, inputs.dtype))


@functools.cache
def _load_cublas():
    """Loads the cuBLASLt of NVIDIA's wheels, where there is one: it lies in none of the loader's folders.

    The op looks for it in the process first. TensorFlow loads it too, but not before its own first product.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
    for name in ("libcublasLt.so.12", "libcublasLt.so.13"):  # TensorFlow's is CUDA 12's
        for path in (path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))
                return str(path)
    return None


@functools.lru_cache(maxsize=64)
def _joint_program(patterns, num_heads):
    """The programs of several patterns as `ProgramArguments` of one, and where each pattern's begin."""
    components, begin, layouts, first = [], [0], b"", [0]
    for pattern in patterns:
        program = lower(pattern, num_heads)
        records = list(program.components)
        for at in range(0, len(records), 6):
            if records[at] == Kind.BLOCKS:
                records[at + 2] += 8 * len(layouts)  # where its bits begin
        begin += [len(components) // 6 + end for end in program.program_begin[1:]]
        components += records
        layouts += program.layouts
        first.append(len(begin) - 1)
    return ProgramArguments(Program(components, begin, layouts)), first
