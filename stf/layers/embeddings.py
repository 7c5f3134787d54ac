"""From tokens to the residual stream: token, position and start vectors."""

import math

import keras
import tensorflow as tf

from stf.layers.initialization import READINGS, paper_initializer
from stf.layers.validation import positive, positives, seed_or_none

MOST_ONE_HOT = 4096  # rows of a token table up to which its gradient is a matrix product


@keras.saving.register_keras_serializable(package="stf")
class SequenceEmbedding(keras.layers.Layer):
    """Embeds each token and its place, and shifts the sequence by one (Section 5.3).

    A place is an index on each of several axes, and each axis has a table of vectors; token and
    place vectors add up. For images the axes are row, column and channel ("data embedding", n_emb
    3); for text and audio row and column of the position in a matrix of the pattern's width l
    ("attention embedding", n_emb 2: `axes=(ceil(n / l), l)`). After that (so the authors' released
    code) a learned start vector is put in front and the last position dropped, so that position t
    sees the tokens before t.

    Example:

    >>> SequenceEmbedding(256, 64, axes=(32, 32, 3))(tf.zeros([1, 3072], tf.int32)).shape
    TensorShape([1, 3072, 64])

    Args:
        vocabulary_size: number of tokens.
        width: d, the length of a vector.
        axes: ints, the size of each axis, slowest first; their product is the longest sequence.
        reading: of the paper's initialization, see `paper_initializer`: tokens N(0, 0.125 / sqrt(d))
            and places N(0, 0.125 / sqrt(d n_emb)). The start vector is as a token.
        seed: int that fixes the initial values, or None.

    Call arguments:
        tokens: integers `[batch, position]`, below `vocabulary_size`.

    Returns:
        `[batch, position, width]`.

    Raises:
        ValueError: for arguments that do not fit, or a sequence known to be longer than the axes.
        InvalidArgumentError: for such a sequence of dynamic length, when it runs.
    """

    def __init__(self, vocabulary_size, width, axes, reading="released", seed=None, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary_size = positive("vocabulary_size", vocabulary_size)
        self.width = positive("width", width)
        self.axes = positives("axes", axes)
        if reading not in READINGS:
            raise ValueError(f"`reading` must be one of {READINGS}. Received: reading={reading!r}")
        self.reading = reading
        self.seed = seed_or_none(seed)

    @property
    def longest(self):
        """Length of the longest sequence."""
        return math.prod(self.axes)

    def build(self, tokens_shape):
        def initializer(number, n_emb=1):
            seed = None if self.seed is None else self.seed + number
            return paper_initializer(self.width * n_emb, reading=self.reading, seed=seed)

        self.tokens = self.add_weight(
            name="tokens", shape=(self.vocabulary_size, self.width), initializer=initializer(0)
        )
        self.start = self.add_weight(name="start", shape=(self.width,), initializer=initializer(1))
        self.places = [
            self.add_weight(
                name=f"axis_{k}",
                shape=(size, self.width),
                initializer=initializer(2 + k, len(self.axes)),
            )
            for k, size in enumerate(self.axes)
        ]

    def call(self, tokens):
        places = self._places(tokens)
        batch = tf.shape(tokens)[0]
        start = tf.broadcast_to(tf.cast(self.start, self.compute_dtype), [batch, 1, self.width])
        # Only what stays is looked up: the last token predicts nothing.
        shifted = _look_up(tf.cast(self.tokens, self.compute_dtype), tf.cast(tokens[:, :-1], tf.int32)) + places
        # An empty sequence has no room for the start vector.
        return tf.concat([start, shifted], axis=1)[:, : tf.shape(tokens)[1]]

    def _places(self, tokens):
        """Place vectors of all positions but the last, `[position - 1, width]`."""
        positions = tokens.shape[1]
        if positions is None:
            positions = tf.shape(tokens)[1]
            check = tf.debugging.assert_less_equal(
                positions, self.longest, f"axes {self.axes} hold {self.longest} positions"
            )
            with tf.control_dependencies([] if check is None else [check]):
                positions = tf.identity(positions)
        elif positions > self.longest:
            raise ValueError(
                f"The axes {self.axes} hold sequences of {self.longest} positions or less. "
                f"Received: tokens of shape {tokens.shape}"
            )
        total = 0.0
        for k, table in enumerate(self.places):
            shape = [1] * len(self.axes) + [self.width]
            shape[k] = self.axes[k]
            total += tf.reshape(tf.cast(table, self.compute_dtype), shape)
        return tf.reshape(total, [self.longest, self.width])[: tf.maximum(positions - 1, 0)]

    def step(self, token, position):
        """What `call` gives for one `position`, from the token before it.

        Args:
            token: integers `[batch]`, the token at `position - 1`; ignored at position 0.
            position: int or scalar tensor.

        Returns:
            `[batch, 1, width]`.
        """
        before = tf.maximum(position - 1, 0)
        vector = tf.gather(self.tokens.value, token)  # [batch, width]
        for k, table in enumerate(self.places):
            index = before // math.prod(self.axes[k + 1 :]) % self.axes[k]
            vector += table.value[index]
        vector = tf.where(tf.equal(position, 0), self.start.value, vector)
        return tf.cast(vector, self.compute_dtype)[:, None]

    def compute_output_shape(self, tokens_shape):
        return (*tokens_shape, self.width)

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "width": self.width,
            "axes": self.axes,
            "reading": self.reading,
            "seed": self.seed,
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
