"""What a residual block computes, as functions of its weights (Child et al. 2019, Eqs. 12-14).

`SparseResidualStack` runs them in a loop over slices of its weights. `SparseResidualBlock` is made of Keras layers and
shares the parts that are no layers.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from stf import ops
from stf.layers.dropout import stateless_dropout
from stf.layers.shapes import batch_and_positions


@keras.saving.register_keras_serializable(package="stf")
def sigmoid_gelu(x):
    """`x * sigmoid(1.702 x)` (Section 5.2 of Child et al. 2019); its gradient stores `x` alone."""
    return tf.nn.silu(x, beta=1.702)


def residual_add(stream, branch, rate, seed, addition, part=None):
    """`stream + dropout(branch)`, the sum that ends each half of a block.

    Args:
        stream: `[batch, position, model_dim]`.
        branch: the same, what attention or feed-forward gave.
        rate: of dropout.
        seed: int32 `[2]` of the block's call, or None for no dropout.
        addition: 0 after attention, 1 after feed-forward: each has a mask of its own.
        part: `stf.layers.dropout.Part`, where these are a part of the positions.
    """
    if seed is not None and rate:
        branch = stateless_dropout(branch, rate, seed + tf.constant([0, addition << 30], seed.dtype), part)
    return stream + branch


def normalize(x, epsilon):
    """`x` less its mean over the last axis, divided by its standard deviation; computed in float32 (float64).

    Args:
        x: `[..., model_dim]`.
        epsilon: added to the variance.
    """

    @tf.custom_gradient
    def run(x):
        def gradient(upstream):
            # Of h = (x - mean) / std: dx = (dh - mean(dh) - h mean(dh h)) / std.
            h, scale = _standardized(x, epsilon)
            upstream = tf.cast(upstream, h.dtype)
            mean = tf.reduce_mean(upstream, -1, keepdims=True)
            along = tf.reduce_mean(upstream * h, -1, keepdims=True)
            return tf.cast((upstream - mean - h * along) * scale, x.dtype)

        return tf.cast(_standardized(x, epsilon)[0], x.dtype), gradient

    return run(x)


def _standardized(x, epsilon):
    """`x` with mean 0 and variance 1, and the reciprocal of its standard deviation."""
    x = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
    centred = x - tf.reduce_mean(x, -1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), -1, keepdims=True) + epsilon)
    return centred * scale, scale


def dense(x, kernel, bias):
    """`x @ kernel + bias` in the dtype of `x`: `[batch, position, in]` by `[in, out]`."""
    return tf.matmul(x, tf.cast(kernel, x.dtype)) + tf.cast(bias, x.dtype)


class BlockWeights(NamedTuple):
    """The weights that a block computes with, or, with an axis of blocks in front, those of a stack.

    The scale and offset of a normalization are part of the kernel and bias behind it, since
    (h gamma + beta) W + b = h (gamma W) + (beta W + b): see `folded`. So no pass over the stream multiplies by them,
    and their gradients come from those of W and b.
    """

    projection_kernel: tf.Tensor  # [model_dim, head * (2 key_dim + value_dim)]: query, key, value side by side
    projection_bias: tf.Tensor
    attention_output_kernel: tf.Tensor  # [head * value_dim, model_dim], W_p
    attention_output_bias: tf.Tensor  # [model_dim]
    hidden_kernel: tf.Tensor  # [model_dim, ff_dim], W_1
    hidden_bias: tf.Tensor  # [ff_dim]
    output_kernel: tf.Tensor  # [ff_dim, model_dim], W_2
    output_bias: tf.Tensor  # [model_dim]


def folded(gamma, beta, kernel, bias):
    """Kernel and bias that give of a normalized stream what `kernel` and `bias` give of it scaled and shifted.

    Args:
        gamma, beta: `[..., model_dim]`.
        kernel: `[..., model_dim, units]`.
        bias: `[..., units]`.
    """
    return kernel * gamma[..., None], bias + tf.squeeze(tf.matmul(beta[..., None, :], kernel), -2)


class Block:
    """One block, in five steps between whose ends a training step may keep tensors or not.

    `query_key_value` -> `attend` -> `add_attention` -> `hidden` -> `add_feed_forward`.

    Args:
        weights: `BlockWeights` of one block.
        pattern: a `stf.patterns.Pattern`.
        num_heads, key_dim, value_dim: of the attention.
        dropout: rate at both residual additions.
        epsilon: of both normalizations.
        part: `stf.layers.dropout.Part`, where the stream is a part of the positions.
    """

    def __init__(self, weights, pattern, num_heads, key_dim, value_dim, dropout, epsilon, part=None):
        self.weights = weights
        self.pattern = pattern
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.dropout = dropout
        self.epsilon = epsilon
        self.part = part

    def query_key_value(self, stream):
        """Queries, keys and values of the normalized stream, side by side: `[batch, position, units]`."""
        return dense(normalize(stream, self.epsilon), self.weights.projection_kernel, self.weights.projection_bias)

    def split(self, query_key_value):
        """Queries, keys and values apart: `[batch, position, head, depth]` each."""
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        parts = tf.split(query_key_value, [keys, keys, values], -1)
        rows = batch_and_positions(query_key_value)
        depths = (self.key_dim, self.key_dim, self.value_dim)
        return [tf.reshape(part, [*rows, self.num_heads, d]) for part, d in zip(parts, depths, strict=True)]

    def attend(self, query_key_value):
        """Attention of each head `[batch, position, head, value_dim]`; its log-sum-exp `[batch, head, position]`."""
        if query_key_value.dtype == tf.float64:  # what the op does not take
            return ops.reference_attention(*self.split(query_key_value), self.pattern, return_log_sum_exp=True)
        return ops.packed_attention(query_key_value, self.pattern, self.num_heads, self.key_dim)

    def attention_gradient(self, query_key_value, heads, log_sum_exp, upstream):
        """The gradient of `attend`'s input, from what it gave and the gradient of its first output."""
        if query_key_value.dtype != tf.float64:
            return ops.packed_attention_gradient(
                query_key_value, self.pattern, self.num_heads, self.key_dim, heads, log_sum_exp, upstream
            )
        with tf.GradientTape() as tape:
            tape.watch(query_key_value)
            heads = self.attend(query_key_value)[0]
        return tape.gradient(heads, query_key_value, upstream)

    def combine(self, heads):
        """The output projection of all heads' attention, `[batch, position, model_dim]`."""
        w = self.weights
        heads = tf.reshape(heads, [*batch_and_positions(heads), self.num_heads * self.value_dim])
        return dense(heads, w.attention_output_kernel, w.attention_output_bias)

    def add_attention(self, stream, heads, seed=None):
        """H + a, where a is the dropped projection of the heads (Eq. 13)."""
        return residual_add(stream, self.combine(heads), self.dropout, seed, 0, self.part)

    def hidden(self, stream):
        """W_1 norm(H + a) + b_1, before its activation: `[batch, position, ff_dim]`."""
        w = self.weights
        return dense(normalize(stream, self.epsilon), w.hidden_kernel, w.hidden_bias)

    def feed_forward_output(self, hidden):
        """W_2 f(hidden) + b_2 (Eq. 14)."""
        return dense(sigmoid_gelu(hidden), self.weights.output_kernel, self.weights.output_bias)

    def add_feed_forward(self, stream, hidden, seed=None):
        """H + a + b, the block's output (Eq. 12)."""
        return residual_add(stream, self.feed_forward_output(hidden), self.dropout, seed, 1, self.part)

    def __call__(self, stream, seed=None):
        """The block: `[batch, position, model_dim]` to the same."""
        stream = self.add_attention(stream, self.attend(self.query_key_value(stream))[0], seed)
        return self.add_feed_forward(stream, self.hidden(stream), seed)
