"""Multi-head self-attention over any sparse pattern."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stf import ops, patterns
from stf.layers.initialization import seeded
from stf.layers.masks import Masks, read_masks
from stf.layers.rotary import RotaryEmbedding
from stf.layers.shapes import batch_and_positions
from stf.layers.validation import above_zero, key_value_heads, positive, positives, seed_or_none
from stf.ops.arguments import check_lengths
from stf.ops.reference import allowed_pairs, reference_weights, weighted_values
from stf.patterns.pattern import Pattern
from stf.typing import Constraint, Initializer, Regularizer, Shape, TensorLike


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
        pattern: a `stf.patterns.Pattern`, or its config. A query sees as many keys as the pattern has:
            `pattern.counts(n)`.
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
        num_key_value_heads: heads of key and value, which divide `num_heads`: as many heads in a row
            share each (grouped-query attention; 1: multi-query). As many as heads unless given.
        attention_sink: whether each head learns a logit that takes part in its softmax without a value,
            so that a query may attend to little (weight `attention_sink` `[head]`, 0 at first).
        rotary: whether queries and keys are turned by their positions: see `RotaryEmbedding`.
        rotary_base: of the angles, where it is rotary.
        rotary_scaling: what positions are divided by, where it is rotary.
        restart: whether, with documents, the pattern's positions and the rotary ones are counted from
            each document's first on, not from the sequence's.

    Call arguments:
        query: `[batch, position, model_dim]`.
        value: like `query` with a width of its own; `query` unless given.
        key: like `value`; `value` unless given.
        lengths: integers `[batch]`, positions in use (padding is on the right), or None for all.
            With them no mask of queries, keys or values is looked at.
        query_mask: bool `[batch, position]`, Keras' mask of the query: positions that it leaves out give
            attention 0. It is that of key and value too where `value` is not given.
        mask: the same; Keras gives either name.
        return_attention_scores: also return the scores, for short sequences of static length.
        training: not used.
        use_causal_mask: True, as every pattern is causal.
        value_mask, key_mask: bool `[batch, position]`: positions that nothing attends to, which must be
            padding on the left, on the right or on both sides (of each document). Queries behind the
            last key in use must be left out too, by `query_mask`.
        attention_mask: bool `[batch, position, position]` or `[position, position]`, by query and key, as
            `keras.layers.MultiHeadAttention` takes it: what it leaves out up to the query must be other
            documents' keys. A causal mask says nothing more than a pattern.
        segment_ids: integers `[batch, position]` of packed sequences: neighbours of one number are a
            document, and a query attends within its own. Negative: of none.
        document_starts: integers `[batch, document]`, the same by the documents' first positions: see
            `stf.ops.document_bounds`.

    Returns:
        `[batch, position, model_dim]`, or with `output_shape` `[batch, position, *output_shape]`; with
        `return_attention_scores` also the weights `[batch, head, position, position]`.

    Raises:
        ValueError: for arguments that do not fit.
        InvalidArgumentError: for a mask that cannot be expressed, when it runs; names it. XLA raises
            nothing: compiled by it, the layer returns NaN for all of such a sequence.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        pattern: Pattern | dict[str, Any],
        value_dim: int | None = None,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        output_initializer: Initializer | None = None,
        kernel_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        activity_regularizer: Regularizer = None,
        kernel_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        seed: int | None = None,
        num_key_value_heads: int | None = None,
        attention_sink: bool = False,
        rotary: bool = False,
        rotary_base: float = 10_000.0,
        rotary_scaling: float = 1.0,
        restart: bool = False,
        **kwargs: Any,
    ) -> None:
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
        self.num_key_value_heads = key_value_heads(num_key_value_heads, self.num_heads)
        self.attention_sink = bool(attention_sink)
        self.rotary = bool(rotary)
        self.rotary_base = above_zero("rotary_base", rotary_base)
        self.rotary_scaling = above_zero("rotary_scaling", rotary_scaling)
        self.rotary_embedding = RotaryEmbedding(self.rotary_base, self.rotary_scaling, dtype=self.dtype_policy)
        if self.rotary and self.key_dim % 2:
            raise ValueError(f"`key_dim` must be even where rotary=True. Received: key_dim={key_dim}")
        self.restart = bool(restart)

    def build(self, query_shape: Shape, value_shape: Shape | None = None, key_shape: Shape | None = None) -> None:
        value_shape = query_shape if value_shape is None else value_shape
        key_shape = value_shape if key_shape is None else key_shape
        self._check_shapes(query_shape, value_shape, key_shape)
        output_shape = self._output_shape or (query_shape[-1],)
        self.query_dense = self._projection("query", 0, self.num_heads, self.key_dim)
        self.key_dense = self._projection("key", 1, self.num_key_value_heads, self.key_dim)
        self.value_dense = self._projection("value", 2, self.num_key_value_heads, self.value_dim)
        axes = "efg"[: len(output_shape)]
        self.output_dense = self._dense("attention_output", 3, f"abcd,cd{axes}->ab{axes}", output_shape, axes)
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((*query_shape[:2], self.num_heads, self.value_dim))
        self.sink = None
        if self.attention_sink:
            self.sink = self.add_weight(
                name="attention_sink", shape=(self.num_heads,), initializer="zeros", autocast=False
            )

    def _projection(self, name, number, heads, depth):
        return self._dense(name, number, "abc,cde->abde", (heads, depth), "de")

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
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        lengths: TensorLike | None = None,
        query_mask: TensorLike | None = None,
        mask: TensorLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = True,
        value_mask: TensorLike | None = None,
        key_mask: TensorLike | None = None,
        attention_mask: TensorLike | None = None,
        segment_ids: TensorLike | None = None,
        document_starts: TensorLike | None = None,
    ) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
        if not use_causal_mask:
            raise ValueError(
                f"`use_causal_mask` must be True: every pattern is causal. Received: use_causal_mask={use_causal_mask}"
            )
        query_mask = query_mask if query_mask is not None else mask
        if lengths is not None:
            query_mask = value_mask = key_mask = None
        if value is None and value_mask is None:  # one mask, of queries and keys
            value_mask = query_mask
        batch, positions = batch_and_positions(query)
        masks = read_masks(
            batch,
            positions,
            query_mask,
            (value_mask, key_mask),
            attention_mask,
            segment_ids,
            document_starts,
        )
        if lengths is not None:
            masks = masks._replace(lengths=lengths)
        projected = self.project(query, value, key)
        if not return_attention_scores:
            return masks.nan_where_refused(self.combine(self._attend(*projected, masks)))
        output, scores = self._dense_attention(*projected, masks)
        return masks.nan_where_refused(self.combine(output)), masks.nan_where_refused(scores)

    def project(
        self, query: TensorLike, value: TensorLike | None = None, key: TensorLike | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Query, key and value, `[batch, position, head, depth]` each, of the heads that each has."""
        value = query if value is None else value
        key = value if key is None else key
        self._check_shapes(query.shape, value.shape, key.shape)
        return self.query_dense(query), self.key_dense(key), self.value_dense(value)

    def attend(
        self,
        query: TensorLike,
        key: TensorLike,
        value: TensorLike,
        lengths: TensorLike | None = None,
        documents: TensorLike | None = None,
    ) -> tf.Tensor:
        """Attention of projected heads, `[batch, position, head, value_dim]`.

        Args:
            query, key, value: what `project` gives.
            lengths: integers `[batch]`, positions in use, or None.
            documents: what `stf.ops.document_bounds` gives, or None.
        """
        return self._attend(query, key, value, Masks(lengths, documents))

    def _attend(self, query, key, value, masks):
        query, key = self.with_positions(query, key, masks.documents)
        attention = ops.reference_attention if query.dtype == tf.float64 else ops.attention
        return masks.answer(attention(query, key, value, self.pattern, sink=self.sink, **self._arguments(masks)))

    def _arguments(self, masks):
        return {"lengths": masks.lengths, "documents": masks.documents, "restart": self.restart}

    def with_positions(
        self,
        query: TensorLike,
        key: TensorLike,
        documents: TensorLike | None = None,
        positions: TensorLike | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Query and key, turned by their positions where the layer is rotary.

        Args:
            query, key: what `project` gives.
            documents: what `stf.ops.document_bounds` gives, or None.
            positions: numbers `[position]`, where these are a part of a sequence, as in decoding.
        """
        if not self.rotary:
            return query, key
        if positions is None and documents is not None and self.restart:
            place = tf.range(tf.cast(tf.shape(query)[1], tf.float64))
            positions = place - tf.cast(documents[:, :, 0], tf.float64)
        return tuple(self.rotary_embedding(x, positions=positions) for x in (query, key))

    def combine(self, heads: tf.Tensor) -> tf.Tensor:
        """The output projection of all heads' attention."""
        return self.output_dense(heads)

    def _dense_attention(self, query, key, value, masks):
        query, key = self.with_positions(query, key, masks.documents)
        masks = masks._replace(lengths=check_lengths(masks.lengths, query))
        allowed = allowed_pairs(self.pattern, query.shape[1], self.num_heads, **self._arguments(masks))
        if masks.answered is not None:
            allowed = allowed & masks.answered[:, None, :, None]
        dtype = tf.float64 if query.dtype == tf.float64 else tf.float32
        scores, _ = reference_weights(tf.cast(query, dtype), tf.cast(key, dtype), allowed, sink=self.sink)
        output = weighted_values(scores, tf.cast(value, dtype))
        return tf.cast(output, value.dtype), tf.cast(scores, value.dtype)

    def attention_weights(
        self, inputs: TensorLike, positions: Sequence[int]
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """What chosen queries attend to, over their own keys alone: nothing of size n x n is made.

        Args:
            inputs: `[batch, position, model_dim]`, what the layer would be called with.
            positions: the query positions, ints.

        Returns:
            For each head a list with, for each position, a pair `(keys, weights)`: NumPy int64
            `[keys]`, ascending, and float32 `[batch, keys]`, whose rows sum to 1 (less what a sink takes).
        """
        query, key, _ = self.project(inputs)
        return weights_of_queries(*self.with_positions(query, key), self.pattern, positions, self.sink)

    def compute_output_shape(
        self, query_shape: Shape, value_shape: Shape | None = None, key_shape: Shape | None = None
    ) -> Shape:
        value_shape = query_shape if value_shape is None else value_shape
        self._check_shapes(query_shape, value_shape, value_shape if key_shape is None else key_shape)
        return (*query_shape[:2], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        return_attention_scores: bool = False,
        **kwargs: Any,
    ) -> keras.KerasTensor | tuple[keras.KerasTensor, keras.KerasTensor]:
        others = (None if x is None else x.shape for x in (value, key))
        output = keras.KerasTensor(self.compute_output_shape(query.shape, *others), dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        shape = (query.shape[0], self.num_heads, query.shape[1], query.shape[1])
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def compute_mask(self, query: TensorLike, previous_mask: TensorLike | None = None) -> TensorLike | None:
        return previous_mask

    def _check_shapes(self, *shapes):
        known = {shape[1] for shape in shapes if len(shape) == 3 and shape[1] is not None}
        if any(len(shape) != 3 for shape in shapes) or len(known) > 1:
            raise ValueError(
                "Query, value and key must be [batch, position, width], with one number of "
                "positions. Received shapes: query={}, value={}, key={}".format(*shapes)
            )

    def get_config(self) -> dict[str, Any]:
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
            num_key_value_heads=self.num_key_value_heads,
            attention_sink=self.attention_sink,
            rotary=self.rotary,
            rotary_base=self.rotary_base,
            rotary_scaling=self.rotary_scaling,
            restart=self.restart,
        )
        return config


def weights_of_queries(query, key, pattern, positions, sink=None):
    """What chosen queries attend to; see `SparseAttention.attention_weights`.

    Args:
        query: `[batch, position, head, key_dim]`.
        key: the same, of as many heads or of fewer that are shared.
        pattern: a `stf.patterns.Pattern`.
        positions: the query positions, ints.
        sink: `[head]`, or None.
    """
    query, key = tf.cast(query, tf.float32), tf.cast(key, tf.float32)
    shared = query.shape[2] // key.shape[2]
    result = []
    for head in range(query.shape[2]):
        of_head = []
        for position in positions:
            keys = pattern.keys(int(position), head)
            scores = tf.einsum(
                "bd,bkd->bk", query[:, position, head], tf.gather(key[:, :, head // shared], keys, axis=1)
            )
            scores /= query.shape[-1] ** 0.5
            if sink is not None:
                scores = tf.concat([scores, tf.fill([tf.shape(scores)[0], 1], sink[head])], 1)
            of_head.append((keys, tf.nn.softmax(scores)[:, : len(keys)].numpy()))
        result.append(of_head)
    return result


def _shape(output_shape):
    if output_shape is None:
        return None
    shape = positives("output_shape", (output_shape,) if isinstance(output_shape, numbers.Integral) else output_shape)
    if len(shape) > 3:
        raise ValueError(f"`output_shape` must have one to three axes. Received: output_shape={output_shape!r}")
    return shape
