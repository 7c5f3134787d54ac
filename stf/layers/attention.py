"""Multi-head attention over sparse patterns, in the manner of `keras.layers.MultiHeadAttention`."""

import keras
import numpy as np
import tensorflow as tf

from stf import ops, patterns
from stf.ops.reference import pattern_mask, reference_weights

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "stf's layers run on Keras' TensorFlow backend: set KERAS_BACKEND=tensorflow. "
        f"Received: {keras.backend.backend()!r}"
    )

_REGULARIZED = ("kernel_regularizer", "bias_regularizer")
_CONSTRAINED = ("kernel_constraint", "bias_constraint")


@keras.saving.register_keras_serializable(package="stf")
class SparseAttention(keras.layers.Layer):
    """Causal multi-head attention over any pattern (Child et al. 2019, Eqs. 2-8).

    Drops in where `keras.layers.MultiHeadAttention` stood with `use_causal_mask=True`. Queries, keys and
    values are projected to heads, attend over the pattern's pairs alone (time grows with the pattern,
    memory with the length), and the heads' outputs are projected together.

    Example:
        >>> layer = stf.layers.SparseAttention(num_heads=8, key_dim=64, pattern=stf.patterns.Local(128))
        >>> layer(keras.random.normal((2, 1024, 512))).shape
        TensorShape([2, 1024, 512])

    Args:
        num_heads: number of heads.
        key_dim: depth of a head's queries and keys.
        pattern: a `stf.patterns.Pattern`, or what `stf.patterns.serialize` made of one.
        value_dim: depth of a head's values; `key_dim` unless given.
        use_bias: whether the four projections have biases.
        output_shape: last dimension of the result, an integer; the query's unless given.
        kernel_initializer: of the projections' kernels.
        bias_initializer: of their biases.
        output_initializer: of the output projection's kernel; `kernel_initializer` unless given.
        kernel_regularizer, bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint:
            as in `keras.layers.MultiHeadAttention`.

    Call arguments:
        query: `[batch, position, dim]`.
        value: like `query`, the source of the values; the query unless given.
        key: the source of the keys; the value unless given.
        lengths: integers `[batch]`, positions in use of each sequence. A Keras mask on the query that
            pads on the right counts as well.
        return_attention_scores: also return the weights `[batch, head, position, position]`, computed
            densely: for short sequences.

    Returns:
        `[batch, position, output_shape]`, and the weights where they were asked for.
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
        **kwargs,
    ):
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.supports_masking = True
        self.supports_jit = False
        for name, number in (("num_heads", num_heads), ("key_dim", key_dim)):
            if not isinstance(number, (int, np.integer)) or number < 1:
                raise ValueError(f"{name} must be a positive integer. Received: {name}={number!r}")
        if output_shape is not None and (not isinstance(output_shape, (int, np.integer)) or output_shape < 1):
            raise ValueError(f"output_shape must be a positive integer. Received: output_shape={output_shape!r}")
        self.num_heads = int(num_heads)
        self.key_dim = int(key_dim)
        self.pattern = patterns.get(pattern)
        self.value_dim = int(value_dim) if value_dim is not None else self.key_dim
        self.use_bias = use_bias
        self._output_shape = output_shape
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        patterns.lower(self.pattern, self.num_heads)  # refuses a pattern made for other heads, now

    def _projection(self, equation, output_shape, bias_axes, name, initializer):
        return keras.layers.EinsumDense(
            equation,
            output_shape=output_shape,
            bias_axes=bias_axes if self.use_bias else None,
            kernel_initializer=_fresh(initializer),
            bias_initializer=_fresh(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def build(self, query_shape, value_shape=None, key_shape=None):
        """Makes the projections for inputs of these shapes."""
        value_shape = value_shape or query_shape
        key_shape = key_shape or value_shape
        heads, kernel = "btd,dhk->bthk", self.kernel_initializer
        self._query_dense = self._projection(heads, (None, self.num_heads, self.key_dim), "hk", "query", kernel)
        self._key_dense = self._projection(heads, (None, self.num_heads, self.key_dim), "hk", "key", kernel)
        self._value_dense = self._projection(heads, (None, self.num_heads, self.value_dim), "hk", "value", kernel)
        width = self._output_shape or query_shape[-1]
        initializer = self.output_initializer or kernel
        self._output_dense = self._projection("bthk,hkd->btd", (None, width), "d", "output", initializer)
        self._query_dense.build(tuple(query_shape))
        self._key_dense.build(tuple(key_shape))
        self._value_dense.build(tuple(value_shape))
        self._output_dense.build((*query_shape[:2], self.num_heads, self.value_dim))
        self.built = True

    def call(
        self,
        query,
        value=None,
        key=None,
        lengths=None,
        query_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        use_causal_mask=True,
        training=None,
    ):
        """Attends; see the class."""
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: the pattern is the mask; padding goes through lengths.")
        if not use_causal_mask:
            raise ValueError("use_causal_mask must be True: every pattern is causal. Received: use_causal_mask=False")
        value = query if value is None else value
        key = value if key is None else key
        if lengths is None and query_mask is not None:
            lengths = _lengths(query_mask)
        q, k, v = self._query_dense(query), self._key_dense(key), self._value_dense(value)
        if not return_attention_scores:
            return self._output_dense(ops.attention(q, k, v, self.pattern, lengths=lengths))
        allowed = pattern_mask(self.pattern, q.shape[1], self.num_heads)[None]
        if lengths is not None:
            used = tf.sequence_mask(lengths, q.shape[1])[:, None]
            allowed = allowed & used[:, :, :, None] & used[:, :, None, :]
        weights, _ = reference_weights(q, k, allowed)
        return self._output_dense(tf.einsum("bhij,bjhd->bihd", weights, v)), weights

    def compute_output_spec(
        self,
        query,
        value=None,
        key=None,
        lengths=None,
        query_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        use_causal_mask=True,
        training=None,
    ):
        """Shapes and dtypes of the results, for symbolic calls."""
        output = keras.KerasTensor((*query.shape[:-1], self._output_shape or query.shape[-1]), self.compute_dtype)
        if not return_attention_scores:
            return output
        positions = query.shape[1]
        weights = (query.shape[0], self.num_heads, positions, positions)
        return output, keras.KerasTensor(weights, self.compute_dtype)

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        """Shape of the result without weights."""
        return (*query_shape[:-1], self._output_shape or query_shape[-1])

    def attention_weights(self, query, positions):
        """Weights of chosen queries over the keys that the pattern gives them; nothing n x n is made.

        Args:
            query: `[batch, position, dim]`, the layer's input.
            positions: query positions.

        Returns:
            A list with, for each of `positions`, a list with, for each head, a pair of NumPy arrays: key
            positions `[keys]` and weights `[batch, keys]` in float32.
        """
        q = tf.cast(self._query_dense(query), tf.float32)
        k = tf.cast(self._key_dense(query), tf.float32)
        found = []
        for position in positions:
            found.append([])
            for head in range(self.num_heads):
                keys = self.pattern.keys(int(position), head)
                rows = tf.gather(k[:, :, head], keys, axis=1)
                scores = tf.einsum("bd,bkd->bk", q[:, int(position), head], rows) / self.key_dim**0.5
                found[-1].append((keys, tf.nn.softmax(scores).numpy()))
        return found

    def decode(self, x, cache, position, keys):
        """One position's output, from and into a cache: attention as a sampler needs it.

        Args:
            x: `[batch, 1, dim]`, the input at `position`.
            cache: pair of variables `[head, position, batch, depth]`, keys and values so far; the position's
                own are written first.
            position: int32 scalar.
            keys: int32 `[head, keys]`, the positions that each head attends to, filled up with -1.

        Returns:
            `[batch, 1, output_shape]`. Scores and softmax are in float32.
        """
        q = self._query_dense(x)[:, 0]
        key_cache, value_cache = cache
        key_cache[:, position].assign(tf.transpose(tf.cast(self._key_dense(x)[:, 0], key_cache.dtype), [1, 0, 2]))
        value_cache[:, position].assign(tf.transpose(tf.cast(self._value_dense(x)[:, 0], value_cache.dtype), [1, 0, 2]))
        index = tf.maximum(keys, 0)
        k = tf.gather(tf.convert_to_tensor(key_cache), index, axis=1, batch_dims=1)
        v = tf.gather(tf.convert_to_tensor(value_cache), index, axis=1, batch_dims=1)
        scores = tf.einsum("bhd,hkbd->bhk", tf.cast(q, tf.float32), tf.cast(k, tf.float32)) / self.key_dim**0.5
        valid = (keys >= 0)[None]
        weights = tf.where(valid, tf.nn.softmax(tf.where(valid, scores, -1e30)), 0)
        mixed = tf.einsum("bhk,hkbd->bhd", weights, tf.cast(v, tf.float32))
        return self._output_dense(tf.cast(mixed[:, None], self.compute_dtype))

    def get_config(self):
        """The constructor's arguments."""
        config = super().get_config()
        config |= {
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "pattern": patterns.serialize(self.pattern),
            "value_dim": self.value_dim,
            "use_bias": self.use_bias,
            "output_shape": self._output_shape,
            "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer),
        }
        for name in ("kernel_initializer", "bias_initializer", "output_initializer"):
            initializer = getattr(self, name)
            config[name] = None if initializer is None else keras.initializers.serialize(initializer)
        for name in _REGULARIZED:
            config[name] = keras.regularizers.serialize(getattr(self, name))
        for name in _CONSTRAINED:
            config[name] = keras.constraints.serialize(getattr(self, name))
        return config


def _fresh(initializer):
    """A copy of an initializer, so that kernels of one shape do not start out equal."""
    return initializer.__class__.from_config(initializer.get_config())


def _lengths(mask):
    """Lengths of a mask that pads on the right."""
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), -1)
    message = "The mask must pad on the right only: its rows must be True, then False."
    right = tf.sequence_mask(lengths, tf.shape(mask)[-1])
    with tf.control_dependencies([tf.debugging.assert_equal(right, tf.cast(mask, tf.bool), message=message)]):
        return tf.identity(lengths)


class _PresetAttention(SparseAttention):
    """Attention whose pattern follows from a few numbers and a mode."""

    def get_config(self):
        """The constructor's arguments."""
        config = super().get_config()
        del config["pattern"]
        return config | {name: getattr(self, name) for name in self._numbers}


@keras.saving.register_keras_serializable(package="stf")
class StridedAttention(_PresetAttention):
    """Strided attention (Child et al. 2019, Section 4.3): the last `stride` positions, and every `stride`-th.

    Example:
        >>> layer = stf.layers.StridedAttention(num_heads=8, key_dim=64, stride=128)

    Args:
        num_heads, key_dim: as in `SparseAttention`.
        stride: l, close to the root of the length.
        mode: how the two kinds of head come together. "merged": every head attends to the union (Eq. 7).
            "multihead": heads take turns, the first local, the second strided (Eq. 8). "local", "strided":
            one kind alone, for models that interleave layers (Eq. 6).
        **kwargs: the other arguments of `SparseAttention`.
    """

    _numbers = ("stride", "mode")

    def __init__(self, num_heads, key_dim, stride, mode="merged", **kwargs):
        local, strided = patterns.Local(stride), patterns.Strided(stride)
        choices = {
            "merged": local | strided,
            "multihead": patterns.PerHead([local, strided]),
            "local": local,
            "strided": strided,
        }
        super().__init__(num_heads, key_dim, _choose(mode, choices), **kwargs)
        self.stride = stride
        self.mode = mode


@keras.saving.register_keras_serializable(package="stf")
class FixedAttention(_PresetAttention):
    """Fixed attention (Child et al. 2019, Section 4.3): the own block, and the summaries of all earlier ones.

    Example:
        >>> layer = stf.layers.FixedAttention(num_heads=8, key_dim=64, stride=128, summary=32)

    Args:
        num_heads, key_dim: as in `SparseAttention`.
        stride: l, the length of a block.
        summary: c, how many positions of a block sum it up; each head takes its own c.
        mode: "merged" (Eq. 7), "multihead" (Eq. 8: own block, summary, in turn), "block" or "summary" alone.
        **kwargs: the other arguments of `SparseAttention`.
    """

    _numbers = ("stride", "summary", "mode")

    def __init__(self, num_heads, key_dim, stride, summary, mode="merged", **kwargs):
        block, summaries = patterns.OwnBlock(stride), patterns.Summary(stride, summary)
        choices = {
            "merged": patterns.Fixed(stride, summary),
            "multihead": patterns.PerHead([block, summaries]),
            "block": block,
            "summary": summaries,
        }
        super().__init__(num_heads, key_dim, _choose(mode, choices), **kwargs)
        self.stride = stride
        self.summary = summary
        self.mode = mode


def _choose(mode, choices):
    if mode not in choices:
        raise ValueError(f"mode must be one of {sorted(choices)}. Received: mode={mode!r}")
    return choices[mode]
