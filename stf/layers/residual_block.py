"""The residual block of Sparse Transformers."""

from typing import Any, Self

import keras
import tensorflow as tf

from stf.distribution.replicas import next_seed
from stf.layers.block import residual_add, sigmoid_gelu
from stf.layers.dropout import SavedSeed
from stf.layers.initialization import seeded
from stf.layers.validation import above_zero, positive, rate, seed_or_none
from stf.typing import Initializer, Regularizer, Shape, TensorLike


@keras.saving.register_keras_serializable(package="stf")
class SparseResidualBlock(SavedSeed, keras.layers.Layer):
    """Attention and feed-forward on a pre-activation residual stream (Child et al. 2019, Eqs. 12-14).

    `a = dropout(attention(norm(H)))`, `b = dropout(ff(norm(H + a)))`, and the output is `H + a + b`,
    with `ff(x) = W2 f(W1 x + b1) + b2` and `f(x) = x sigmoid(1.702 x)`.

    With `recompute` a training step keeps H alone and computes attention and feed-forward again in
    the backward pass (Section 5.4), with the same dropout masks: gradients are the same to
    rounding. (`keras.remat` draws others.)

    Examples:
        >>> attention = stf.layers.StridedAttention(num_heads=2, key_dim=16, stride=32)
        >>> block = stf.layers.SparseResidualBlock(attention, dropout=0.25, recompute=True)
        >>> block(tf.zeros([1, 1024, 64])).shape
        TensorShape([1, 1024, 64])

    Args:
        attention: a layer from `[batch, position, model_dim]` to the same. It must be the same function
            each time it is called: no dropout of its own. What the block is called with beside its
            inputs it is called with too, by name: `lengths`, `mask`, `segment_ids`, `document_starts`.
        ff_dim: number of hidden units of the feed-forward layer; `4 model_dim` unless given.
        dropout: rate of both dropouts, from 0 to less than 1.
        recompute: whether to compute the block again in the backward pass.
        epsilon: of both normalizations.
        kernel_initializer: of W1 and W2.
        output_initializer: of W2; `kernel_initializer` unless given.
        bias_initializer: of b1 and b2.
        kernel_regularizer: of W1 and W2.
        seed: int that fixes dropout and initial values, or None.

    Call arguments:
        inputs: H, `[batch, position, model_dim]`.
        lengths: integers `[batch]`, given to the attention, or None.
        mask: Keras' mask, given to the attention unless lengths are, or None; `inputs_mask` is the same.
        training: whether to drop.
        segment_ids, document_starts: of packed documents, given to the attention, or None.

    Returns:
        `[batch, position, model_dim]`.

    Raises:
        ValueError: for arguments that do not fit.
        InvalidArgumentError: for a mask as `SparseAttention` refuses it; NaN where XLA compiles.
    """

    def __init__(
        self,
        attention: keras.layers.Layer,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        recompute: bool = False,
        epsilon: float = 1e-5,
        kernel_initializer: Initializer = "glorot_uniform",
        output_initializer: Initializer | None = None,
        bias_initializer: Initializer = "zeros",
        kernel_regularizer: Regularizer = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        if not isinstance(attention, keras.layers.Layer):
            raise ValueError(f"`attention` must be a Keras layer. Received: attention={attention}")
        if recompute and attention.activity_regularizer is not None:
            raise ValueError(
                "`recompute` cannot be combined with an attention's activity_regularizer, whose loss "
                f"it would hide. Received: {attention.activity_regularizer}"
            )
        self.attention = attention
        self.ff_dim = None if ff_dim is None else positive("ff_dim", ff_dim)
        self.dropout = rate("dropout", dropout)
        self.recompute = bool(recompute)
        self.epsilon = above_zero("epsilon", epsilon)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed = seed_or_none(seed)
        self.seed_generator = keras.random.SeedGenerator(self.seed) if self.dropout else None

    def build(self, inputs_shape: Shape) -> None:
        width = inputs_shape[-1]
        hidden = 4 * width if self.ff_dim is None else self.ff_dim
        self.attention_norm = self._norm("attention_norm")
        self.feed_forward_norm = self._norm("feed_forward_norm")
        self.hidden_dense = self._dense("hidden", 0, hidden, self.kernel_initializer)
        self.output_dense = self._dense(
            "feed_forward_output", 1, width, self.output_initializer or self.kernel_initializer
        )
        self.attention_norm.build(inputs_shape)
        if not self.attention.built:
            self.attention.build(inputs_shape)
        self.feed_forward_norm.build(inputs_shape)
        self.hidden_dense.build(inputs_shape)
        self.output_dense.build((*inputs_shape[:-1], hidden))

    def _norm(self, name):
        return keras.layers.LayerNormalization(epsilon=self.epsilon, dtype=self.dtype_policy, name=name)

    def _dense(self, name, number, units, kernel_initializer):
        return keras.layers.Dense(
            units,
            kernel_initializer=seeded(kernel_initializer, self.seed, number),
            bias_initializer=seeded(self.bias_initializer, self.seed, number + 2),
            kernel_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(
        self,
        inputs: TensorLike,
        lengths: TensorLike | None = None,
        mask: TensorLike | None = None,
        training: bool | None = None,
        segment_ids: TensorLike | None = None,
        document_starts: TensorLike | None = None,
        inputs_mask: TensorLike | None = None,
    ) -> tf.Tensor:
        mask = inputs_mask if mask is None else mask  # by which of the names Keras gives it
        options = {"lengths": lengths, "segment_ids": segment_ids, "document_starts": document_starts}
        options |= {"mask": mask if lengths is None else None}
        options = {name: option for name, option in options.items() if option is not None}
        # Everything that changes from call to call is fixed here, outside what is recomputed.
        seed = self.next_seed(training)
        if self.recompute and training:
            return tf.recompute_grad(lambda stream: self.residual(stream, options, seed))(inputs)
        return self.residual(inputs, options, seed)

    def next_seed(self, training: bool | None = None) -> tf.Tensor | None:
        """The seed of this call's dropout, int32 `[2]`; None where nothing is dropped."""
        if not training or self.seed_generator is None:
            return None
        return next_seed(self.seed_generator)

    def residual(
        self, stream: tf.Tensor, options: dict[str, Any] | None = None, seed: tf.Tensor | None = None
    ) -> tf.Tensor:
        """The block without anything that a call changes: Eqs. 12-14, with dropout's masks drawn from `seed`.

        Args:
            stream: H, `[batch, position, model_dim]`.
            options: what the attention is called with beside it, by name.
            seed: int32 `[2]`, or None for no dropout.
        """
        # The attention may have a dtype policy of its own.
        a = tf.cast(self.attention(self.attention_norm(stream), **(options or {})), stream.dtype)
        stream = residual_add(stream, a, self.dropout, seed, 0)
        return residual_add(stream, self.feed_forward(self.feed_forward_norm(stream)), self.dropout, seed, 1)

    def feed_forward(self, inputs: TensorLike) -> tf.Tensor:
        """`W2 f(W1 x + b1) + b2` at each position (Eq. 14)."""
        return self.output_dense(sigmoid_gelu(self.hidden_dense(inputs)))

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return inputs_shape

    def compute_output_spec(self, inputs: TensorLike, **kwargs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def compute_mask(self, inputs: TensorLike, previous_mask: TensorLike | None = None) -> TensorLike | None:
        return previous_mask

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        serialize = keras.saving.serialize_keras_object
        config.update(
            attention=serialize(self.attention),
            ff_dim=self.ff_dim,
            dropout=self.dropout,
            recompute=self.recompute,
            epsilon=self.epsilon,
            kernel_initializer=serialize(self.kernel_initializer),
            output_initializer=serialize(self.output_initializer),
            bias_initializer=serialize(self.bias_initializer),
            kernel_regularizer=serialize(self.kernel_regularizer),
            seed=self.seed,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        config["attention"] = keras.saving.deserialize_keras_object(config["attention"])
        return cls(**config)
