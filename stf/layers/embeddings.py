"""From tokens to the residual stream: token, position and start vectors."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from stf.layers.initialization import INITIALIZATIONS, Initialization, paper_initializer
from stf.layers.validation import positive, positives, seed_or_none
from stf.typing import Shape, TensorLike

MOST_ONE_HOT = 4096  # rows of a token table up to which its gradient is a matrix product


@keras.saving.register_keras_serializable(package="stf")
class SequenceEmbedding(keras.layers.Layer):
    """Embeds each token and its place, and shifts the sequence by one (Section 5.3).

    A place is an index on each of several axes, and each axis has a table of vectors; token and
    place vectors add up. For images the axes are row, column and channel ("data embedding", n_emb
    3); for text and audio row and column of the position in a matrix of the pattern's width l
    ("attention embedding", n_emb 2: `position_shape=(ceil(n / l), l)`). After that (so the authors' released
    code) a learned start vector is put in front and the last position dropped, so that position t
    sees the tokens before t.

    What a sequence is may be given too: `conditions` are ints, each an index into a table of its own (a class; the
    transformation of an image, as in Jun et al. 2020), whose vectors are added at every position.

    Examples:
        >>> stf.layers.SequenceEmbedding(256, 64, position_shape=(32, 32, 3))(tf.zeros([1, 3072], tf.int32)).shape
        TensorShape([1, 3072, 64])

    Args:
        vocab_size: number of tokens.
        model_dim: d, the length of a vector.
        position_shape: ints, the size of each axis, slowest first; their product is the longest sequence.
        init: of the paper's initialization, see `paper_initializer`: tokens N(0, 0.125 / sqrt(d))
            and places N(0, 0.125 / sqrt(d n_emb)). The start vector is as a token.
        seed: int that fixes the initial values, or None.
        conditions: ints, how many values each condition of a sequence has; there are none unless given.

    Call arguments:
        tokens: integers `[batch, position]`, below `vocab_size`.
        conditions: integers `[batch, condition]`, each below its size; all 0 unless given.

    Returns:
        `[batch, position, model_dim]`.

    Raises:
        ValueError: for arguments that do not fit, conditions of another shape, or a sequence known to be longer than
            `position_shape` holds.
        InvalidArgumentError: for such a sequence of dynamic length, when it runs; on a CPU, outside XLA, for a
            condition that its table does not have.
    """

    def __init__(
        self,
        vocab_size: int,
        model_dim: int,
        position_shape: Sequence[int],
        init: Initialization = "released",
        seed: int | None = None,
        conditions: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = positive("vocab_size", vocab_size)
        self.model_dim = positive("model_dim", model_dim)
        self.position_shape = positives("position_shape", position_shape)
        if init not in INITIALIZATIONS:
            raise ValueError(f"`init` must be one of {INITIALIZATIONS}. Received: init={init!r}")
        self.init = init
        self.seed = seed_or_none(seed)
        self.conditions = (
            () if isinstance(conditions, tuple | list) and not conditions else positives("conditions", conditions)
        )

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return math.prod(self.position_shape)

    def build(self, tokens_shape: Shape) -> None:
        def initializer(number, n_emb=1):
            seed = None if self.seed is None else self.seed + number
            return paper_initializer(self.model_dim * n_emb, init=self.init, seed=seed)

        self.tokens = self.add_weight(
            name="tokens", shape=(self.vocab_size, self.model_dim), initializer=initializer(0)
        )
        self.start = self.add_weight(name="start", shape=(self.model_dim,), initializer=initializer(1))
        self.places = [
            self.add_weight(
                name=f"axis_{k}",
                shape=(size, self.model_dim),
                initializer=initializer(2 + k, len(self.position_shape)),
            )
            for k, size in enumerate(self.position_shape)
        ]
        first = 2 + len(self.position_shape)
        self.condition_tables = [
            self.add_weight(name=f"condition_{k}", shape=(size, self.model_dim), initializer=initializer(first + k))
            for k, size in enumerate(self.conditions)
        ]

    def call(self, tokens: TensorLike, conditions: TensorLike | None = None) -> tf.Tensor:
        conditions = self._checked(conditions, tokens.shape[0])
        # Only what stays is looked up: the last token predicts nothing.
        last = self._positions(tokens) - 1
        last = max(last, 0) if isinstance(last, int) else tf.maximum(last, 0)
        shifted = self._look_up(tokens[:, :-1]) + self._places(0, last)
        # An empty sequence has no room for the start vector.
        embedded = tf.concat([self._starts(tokens), shifted], axis=1)[:, : tf.shape(tokens)[1]]
        return self._conditioned(embedded, conditions)

    def part(self, tokens: TensorLike, begin: int, end: int, conditions: TensorLike | None = None) -> tf.Tensor:
        """What `call` gives for the positions from `begin` to `end`, as one of several devices needs it.

        Args:
            tokens: integers `[batch, position]`, whole sequences.
            begin, end: ints; positions behind the last are padding.
            conditions: as for `call`.

        Returns:
            `[batch, end - begin, model_dim]`.
        """
        conditions = self._checked(conditions, tokens.shape[0])
        last = max(min(end, tokens.shape[1]) - 1, 0)
        first = min(max(begin - 1, 0), last)  # from here to `last` tokens are looked up
        shifted = self._look_up(tokens[:, first:last]) + self._places(first, last)
        if begin == 0:
            shifted = tf.concat([self._starts(tokens), shifted], axis=1)
        embedded = tf.pad(shifted, [[0, 0], [0, end - begin - shifted.shape[1]], [0, 0]])
        return self._conditioned(embedded, conditions)

    def _starts(self, tokens):
        return tf.broadcast_to(tf.cast(self.start, self.compute_dtype), [tf.shape(tokens)[0], 1, self.model_dim])

    def _look_up(self, tokens):
        return _look_up(tf.cast(self.tokens, self.compute_dtype), tf.cast(tokens, tf.int32))

    def _conditioned(self, embedded, conditions):
        if not self.conditions:
            return embedded
        return embedded + self._of_conditions(conditions, tf.shape(embedded)[0])[:, None]

    def _checked(self, conditions, rows):
        """Conditions as a tensor, or None; ValueError where they are not `[rows, condition]` integers of these."""
        if conditions is None:
            return None
        conditions = tf.convert_to_tensor(conditions)
        count = len(self.conditions)
        fits = conditions.dtype.is_integer and conditions.shape.is_compatible_with((rows, count))
        if not count or not fits:
            batch = "batch" if rows is None else rows
            raise ValueError(
                f"conditions must be integers [{batch}, {count}], of a model that has them. "
                f"Received: conditions of shape {conditions.shape} and dtype {conditions.dtype.name}"
            )
        return conditions

    def _of_conditions(self, conditions, batch):
        """The sum of the conditions' vectors, `[batch, model_dim]`."""
        conditions = tf.zeros([batch, len(self.conditions)], tf.int32) if conditions is None else conditions
        tables = [tf.cast(table, self.compute_dtype) for table in self.condition_tables]
        return tf.add_n([_look_up(table, tf.cast(conditions[:, k], tf.int32)) for k, table in enumerate(tables)])

    def _positions(self, tokens):
        """How many positions there are: an int, or a tensor; ValueError or InvalidArgumentError for too many."""
        positions = tokens.shape[1]
        if positions is None:
            positions = tf.shape(tokens)[1]
            check = tf.debugging.assert_less_equal(
                positions, self.longest, f"position_shape={self.position_shape} holds {self.longest} positions"
            )
            with tf.control_dependencies([] if check is None else [check]):
                positions = tf.identity(positions)
        elif positions > self.longest:
            raise ValueError(
                f"position_shape={self.position_shape} holds sequences of {self.longest} positions or less. "
                f"Received: tokens of shape {tokens.shape}"
            )
        return positions

    def _places(self, begin, end):
        """Place vectors of the positions from `begin`, an int, to `end`, an int or a tensor."""
        inner = math.prod(self.position_shape[1:])
        first = begin // inner
        stop = -(-end // inner) if isinstance(end, int) else self.position_shape[0]
        rows = stop - first
        total = 0.0
        for k, table in enumerate(self.places):
            shape = [1] * len(self.position_shape) + [self.model_dim]
            shape[k] = self.position_shape[k] if k else rows
            table = tf.cast(table if k else table[first : first + rows], self.compute_dtype)
            total += tf.reshape(table, shape)
        return tf.reshape(total, [rows * inner, self.model_dim])[begin - first * inner : end - first * inner]

    def step(self, token: TensorLike, position: int | tf.Tensor, conditions: TensorLike | None = None) -> tf.Tensor:
        """What `call` gives for one `position`, from the token before it.

        Args:
            token: integers `[batch]`, the token at `position - 1`; ignored at position 0.
            position: int or scalar tensor.
            conditions: as for `call`.

        Returns:
            `[batch, 1, model_dim]`.
        """
        conditions = self._checked(conditions, None)
        before = tf.maximum(position - 1, 0)
        vector = tf.gather(self.tokens.value, token)  # [batch, model_dim]
        for k, table in enumerate(self.places):
            index = before // math.prod(self.position_shape[k + 1 :]) % self.position_shape[k]
            vector += tf.gather(table.value, index)
        vector = tf.where(tf.equal(position, 0), self.start.value, vector)
        vector = tf.cast(vector, self.compute_dtype)
        if self.conditions:
            vector += self._of_conditions(conditions, tf.shape(token)[0])
        return vector[:, None]

    def compute_output_shape(self, tokens_shape: Shape, conditions_shape: Shape | None = None) -> Shape:
        return (*tokens_shape, self.model_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocab_size": self.vocab_size,
            "model_dim": self.model_dim,
            "position_shape": self.position_shape,
            "init": self.init,
            "seed": self.seed,
            "conditions": self.conditions,
        }


@tf.custom_gradient
def _look_up(table, tokens):
    """Rows of a table `[token, width]`, whose gradient is dense and has the same bits every time.

    A gather's own gradient is a list of rows in which tokens repeat: norms of it are not those of the gradient, and a
    GPU adds it up in any order. A matrix product with one-hot rows adds in one order; tables too long for that sum up
    segments.
    """

    def gradient(upstream):
        rows, width = table.shape
        tokens_flat, upstream = tf.reshape(tokens, [-1]), tf.reshape(upstream, [-1, width])
        if rows > MOST_ONE_HOT:
            return tf.math.unsorted_segment_sum(upstream, tokens_flat, rows), None
        return tf.matmul(tf.one_hot(tokens_flat, rows, dtype=upstream.dtype), upstream, transpose_a=True), None

    return tf.gather(table, tokens), gradient
