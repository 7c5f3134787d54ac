"""Multi-head self-attention over any sparse pattern."""

import numbers

import keras
import tensorflow as tf

from stf import ops, patterns
from stf.layers.initialization import seeded
from stf.layers.padding import lengths_of, nan_where_refused
from stf.layers.validation import positive, positives, seed_or_none
from stf.ops.reference import pattern_mask, reference_weights


@keras.saving.register_keras_serializable(package="stf")
class SparseAttention(keras.layers.Layer):
    """Causal multi-head self-attention in which each query reads the keys of a pattern.

    Drops in where `keras.layers.MultiHeadAttention` stood in a causal model: the arguments, the
    projections and their variables are the same, and `layer(x)` means `layer(x, x)`. Time grows
    with the pattern's pairs, memory with the length (Child et al. 2019, Section 4.2, Eqs. 2-8).
    There is no dropout inside attention (Section 5.4). In float64, and where the scores are asked
    for, attention is dense, for short sequences.

    Examples:
        >>> layer = stf.layers.SparseAttention(num_heads=2, key_dim=16, pattern=stf.patterns.Local(32))
        >>> layer(tf.zeros([1, 1024, 64])).shape
        TensorShape([1, 1024, 64])

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's query and key.
        pattern: a `stf.patterns.Pattern`, or its config.
        value_dim: depth of each head's value; `key_dim` unless given.
        use_bias: whether the four projections add a bias.
        output_shape: shape of an output beside batch and position, an int or a tuple; the last
            axis of the query unless given.
        kernel_initializer: of the kernels.
        bias_initializer: of the biases.
        output_initializer: of the output projection's kernel; `kernel_initializer` unless given.
        kernel_regularizer: of the kernels.
        bias_regularizer: of the biases.
        activity_regularizer: of the layer's output.
        kernel_constraint: of the kernels.
        bias_constraint: of the biases.
        seed: int that fixes the kernels' random initial values, each kernel its own; None leaves
            the initializers as they are.

    Call arguments:
        query: `[batch, position, model_dim]`.
        value: like `query` with a width of its own; `query` unless given.
        key: like `value`; `value` unless given.
        lengths: integers `[batch]`, positions in use (padding is on the right), or None for all.
            Without them a Keras mask of the query is taken, which must be of that kind.
        query_mask: bool `[batch, position]`, Keras' mask of the query.
        mask: the same; Keras gives either name.
        return_attention_scores: also return the scores, for short sequences of static length.
        training: not used.
        use_causal_mask: True, as every pattern is causal.

    Returns:
        `[batch, position, model_dim]`, or with `output_shape` `[batch, position, *output_shape]`; with
        `return_attention_scores` also the weights `[batch, head, position, position]`.

    Raises:
        ValueError: for arguments that do not fit.
        InvalidArgumentError: for a mask with padding that is not on the right, when it runs. XLA raises
            nothing: compiled by it, the layer returns NaN for all of such a sequence.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        pattern,
        value_dim=None,
        use_bias=True,
        output_shape=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        output_initializer=None,
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.supports_masking = True
        self.num_heads = positive("num_heads", num_heads)
        self.key_dim = positive("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else positive("value_dim", value_dim)
        self.pattern = patterns.get(pattern)
        self.pattern.check_heads(self.num_heads)
        self.use_bias = bool(use_bias)
        self._output_shape = _shape(output_shape)  # Keras models have an `output_shape` already
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.seed = seed_or_none(seed)

    def build(self, query_shape, value_shape=None, key_shape=None):
        value_shape = query_shape if value_shape is None else value_shape
        key_shape = value_shape if key_shape is None else key_shape
        self._check_shapes(query_shape, value_shape, key_shape)
        output_shape = self._output_shape or (query_shape[-1],)
        self.query_dense = self._projection("query", 0, self.key_dim)
        self.key_dense = self._projection("key", 1, self.key_dim)
        self.value_dense = self._projection("value", 2, self.value_dim)
        axes = "efg"[: len(output_shape)]
        self.output_dense = self._dense("attention_output", 3, f"abcd,cd{axes}->ab{axes}", output_shape, axes)
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((*query_shape[:2], self.num_heads, self.value_dim))

    def _projection(self, name, number, depth):
        return self._dense(name, number, "abc,cde->abde", (self.num_heads, depth), "de")

    def _dense(self, name, number, equation, shape, bias_axes):
        kernel = self.kernel_initializer
        if name == "attention_output" and self.output_initializer is not None:
            kernel = self.output_initializer
        dense = keras.layers.EinsumDense(
            equation,
            output_shape=(None, *shape),
            bias_axes=bias_axes if self.use_bias else None,
            kernel_initializer=seeded(kernel, self.seed, number),
            bias_initializer=seeded(self.bias_initializer, self.seed, number + 4),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )
        dense.supports_masking = True  # position by position: a mask stays what it is
        return dense

    def call(
        self,
        query,
        value=None,
        key=None,
        lengths=None,
        query_mask=None,
        mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=True,
    ):
        if not use_causal_mask:
            raise ValueError(
                f"`use_causal_mask` must be True: every pattern is causal. Received: use_causal_mask={use_causal_mask}"
            )
        mask = query_mask if query_mask is not None else mask
        if lengths is None:
            lengths = lengths_of(mask)
        else:
            mask = None
        projected = self.project(query, value, key)
        if not return_attention_scores:
            return nan_where_refused(self.combine(self.attend(*projected, lengths)), mask)
        output, scores = self._dense_attention(*projected, lengths)
        return nan_where_refused(self.combine(output), mask), nan_where_refused(scores, mask)

    def project(self, query, value=None, key=None):
        """Query, key and value of each head, `[batch, position, head, depth]` each."""
        value = query if value is None else value
        key = value if key is None else key
        self._check_shapes(query.shape, value.shape, key.shape)
        return self.query_dense(query), self.key_dense(key), self.value_dense(value)

    def attend(self, query, key, value, lengths=None):
        """Attention of projected heads, `[batch, position, head, value_dim]`."""
        if query.dtype == tf.float64:
            return ops.reference_attention(query, key, value, self.pattern, lengths=lengths)
        return ops.attention(query, key, value, self.pattern, lengths=lengths)

    def combine(self, heads):
        """The output projection of all heads' attention."""
        return self.output_dense(heads)

    def _dense_attention(self, query, key, value, lengths):
        positions = query.shape[1]
        allowed = pattern_mask(self.pattern, positions, self.num_heads)[None]
        if lengths is not None:
            used = tf.sequence_mask(lengths, positions)[:, None]
            allowed = allowed & used[:, :, :, None] & used[:, :, None, :]
        dtype = tf.float64 if query.dtype == tf.float64 else tf.float32
        scores, _ = reference_weights(tf.cast(query, dtype), tf.cast(key, dtype), allowed)
        output = tf.einsum("bhij,bjhd->bihd", scores, tf.cast(value, dtype))
        return tf.cast(output, value.dtype), tf.cast(scores, value.dtype)

    def attention_weights(self, inputs, positions):
        """What chosen queries attend to, over their own keys alone: nothing of size n x n is made.

        Args:
            inputs: `[batch, position, model_dim]`, what the layer would be called with.
            positions: the query positions, ints.

        Returns:
            For each head a list with, for each position, a pair `(keys, weights)`: NumPy int64
            `[keys]`, ascending, and float32 `[batch, keys]`, whose rows sum to 1.
        """
        query, key, _ = self.project(inputs)
        return weights_of_queries(query, key, self.pattern, positions)

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        value_shape = query_shape if value_shape is None else value_shape
        self._check_shapes(query_shape, value_shape, value_shape if key_shape is None else key_shape)
        return (*query_shape[:2], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(self, query, value=None, key=None, return_attention_scores=False, **kwargs):
        shapes = [None if x is None else x.shape for x in (query, value, key)]
        output = keras.KerasTensor(self.compute_output_shape(*shapes), dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        shape = (query.shape[0], self.num_heads, query.shape[1], query.shape[1])
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def compute_mask(self, query, previous_mask=None):
        return previous_mask

    def _check_shapes(self, *shapes):
        known = {shape[1] for shape in shapes if len(shape) == 3 and shape[1] is not None}
        if any(len(shape) != 3 for shape in shapes) or len(known) > 1:
            raise ValueError(
                "Query, value and key must be [batch, position, width], with one number of "
                "positions. Received shapes: query={}, value={}, key={}".format(*shapes)
            )

    def get_config(self):
        config = super().get_config()
        serialize = keras.saving.serialize_keras_object
        config.update(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            pattern=patterns.serialize(self.pattern),
            value_dim=self.value_dim,
            use_bias=self.use_bias,
            output_shape=self._output_shape,
            kernel_initializer=serialize(self.kernel_initializer),
            bias_initializer=serialize(self.bias_initializer),
            output_initializer=serialize(self.output_initializer),
            kernel_regularizer=serialize(self.kernel_regularizer),
            bias_regularizer=serialize(self.bias_regularizer),
            activity_regularizer=serialize(self.activity_regularizer),
            kernel_constraint=serialize(self.kernel_constraint),
            bias_constraint=serialize(self.bias_constraint),
            seed=self.seed,
        )
        return config


def weights_of_queries(query, key, pattern, positions):
    """What chosen queries attend to; see `SparseAttention.attention_weights`.

    Args:
        query, key: `[batch, position, head, key_dim]`.
        pattern: a `stf.patterns.Pattern`.
        positions: the query positions, ints.
    """
    query, key = tf.cast(query, tf.float32), tf.cast(key, tf.float32)
    result = []
    for head in range(query.shape[2]):
        of_head = []
        for position in positions:
            keys = pattern.keys(int(position), head)
            scores = tf.einsum("bd,bkd->bk", query[:, position, head], tf.gather(key[:, :, head], keys, axis=1))
            of_head.append((keys, tf.nn.softmax(scores / query.shape[-1] ** 0.5).numpy()))
        result.append(of_head)
    return result


def _shape(output_shape):
    if output_shape is None:
        return None
    shape = positives("output_shape", (output_shape,) if isinstance(output_shape, numbers.Integral) else output_shape)
    if len(shape) > 3:
        raise ValueError(f"`output_shape` must have one to three axes. Received: output_shape={output_shape!r}")
    return shape
