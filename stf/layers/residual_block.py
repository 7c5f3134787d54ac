"""The residual block of Sparse Transformers (Child et al. 2019, Section 5)."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="stf")
class SparseResidualBlock(keras.layers.Layer):
    """A pre-activation residual block around any attention layer (Eqs. 12-14).

        a(H) = dropout(attention(norm(H)))
        b(H) = dropout(ff(norm(H + a(H))))
        result = H + a(H) + b(H)

    with ff(x) = W2 f(W1 x + b1) + b2 and f(x) = x sigmoid(1.702 x). Dropout acts at the two additions alone.

    Example:
        >>> attention = stf.layers.StridedAttention(num_heads=8, key_dim=64, stride=128)
        >>> x = stf.layers.SparseResidualBlock(attention, dropout=0.25, recompute=True)(x)

    Args:
        attention: a layer from `[batch, position, dim]` to the same shape.
        ff_dim: width of the feed-forward's hidden layer; 4 dim unless given.
        dropout: rate at the two additions, in [0, 1).
        recompute: keep only H and H + a(H) for the backward pass and compute attention and feed-forward
            again there (Section 5.4; through `tf.recompute_grad`). Dropout masks come from explicit seeds,
            so that both passes draw the same.
        epsilon: of the two layer normalisations.
        kernel_initializer, output_initializer: of W1 and W2.
        seed: of the dropout masks.
    """

    def __init__(
        self,
        attention,
        ff_dim=None,
        dropout=0.0,
        recompute=False,
        epsilon=1e-5,
        kernel_initializer="glorot_uniform",
        output_initializer="glorot_uniform",
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(attention, keras.layers.Layer):
            raise ValueError(f"attention must be a Keras layer. Received: attention={attention!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1). Received: dropout={dropout!r}")
        if ff_dim is not None and ff_dim < 1:
            raise ValueError(f"ff_dim must be at least 1. Received: ff_dim={ff_dim!r}")
        self.supports_jit = False
        self.attention = attention
        self.ff_dim = ff_dim
        self.dropout = dropout
        self.recompute = recompute
        self.epsilon = epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.seed = seed
        self._seeds = keras.random.SeedGenerator(seed) if dropout else None

    def build(self, input_shape):
        """Makes the normalisations and the feed-forward layers."""
        dim = input_shape[-1]
        options = {"dtype": self.dtype_policy}
        self._attention_norm = keras.layers.LayerNormalization(epsilon=self.epsilon, name="attention_norm", **options)
        self._ff_norm = keras.layers.LayerNormalization(epsilon=self.epsilon, name="ff_norm", **options)
        self._ff_in = keras.layers.Dense(
            self.ff_dim or 4 * dim, kernel_initializer=self.kernel_initializer, name="ff_in", **options
        )
        self._ff_out = keras.layers.Dense(dim, kernel_initializer=self.output_initializer, name="ff_out", **options)
        for layer in (self._attention_norm, self._ff_norm, self._ff_in):
            layer.build(input_shape)
        if not self.attention.built:
            self.attention.build(input_shape)
        self._ff_out.build((*input_shape[:-1], self._ff_in.units))
        self.built = True

    def _drop(self, x, seed):
        if seed is None:
            return x
        kept = tf.random.stateless_uniform(tf.shape(x), seed, dtype=tf.float32) >= self.dropout
        return tf.where(kept, x * tf.cast(1 / (1 - self.dropout), x.dtype), tf.zeros_like(x))

    def _feed_forward(self, x):
        x = self._ff_in(x)
        return self._ff_out(x * tf.sigmoid(tf.cast(1.702, x.dtype) * x))

    def call(self, inputs, lengths=None, training=None):
        """`inputs` `[batch, position, dim]`; `lengths` as in `SparseAttention`, where given."""
        seeds = [None, None]
        if training and self._seeds is not None:
            seeds = [tf.cast(tf.convert_to_tensor(self._seeds.next()), tf.int32) for _ in seeds]
        options = {} if lengths is None else {"lengths": lengths}

        def attend(x):
            return self._drop(self.attention(self._attention_norm(x), training=training, **options), seeds[0])

        def feed_forward(x):
            return self._drop(self._feed_forward(self._ff_norm(x)), seeds[1])

        if self.recompute and training:
            attend, feed_forward = tf.recompute_grad(attend), tf.recompute_grad(feed_forward)
        middle = inputs + attend(inputs)
        return middle + feed_forward(middle)

    def compute_output_spec(self, inputs, lengths=None, training=None):
        """The input's shape."""
        return keras.KerasTensor(inputs.shape, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def decode(self, x, cache, position, keys):
        """One position's output; arguments as in `SparseAttention.decode`."""
        middle = x + self.attention.decode(self._attention_norm(x), cache, position, keys)
        return middle + self._feed_forward(self._ff_norm(middle))

    def get_config(self):
        """The constructor's arguments."""
        return super().get_config() | {
            "attention": keras.saving.serialize_keras_object(self.attention),
            "ff_dim": self.ff_dim,
            "dropout": self.dropout,
            "recompute": self.recompute,
            "epsilon": self.epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """The block of a configuration."""
        config = dict(config)
        config["attention"] = keras.saving.deserialize_keras_object(config["attention"])
        return cls(**config)
