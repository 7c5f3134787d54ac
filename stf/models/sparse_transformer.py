"""The Sparse Transformer (Child et al. 2019, Section 5)."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from stf import patterns as stf_patterns
from stf.distribution.sequence_parallel import SequenceParallelTrainer
from stf.layers import SequenceEmbedding, SparseResidualStack, paper_initializer
from stf.layers.initialization import INITIALIZATIONS, Initialization
from stf.layers.validation import positive, positives, seed_or_none
from stf.models import introspection
from stf.models.dispatch import without_waiting
from stf.models.parallel import on_devices
from stf.models.presets import preset
from stf.patterns.pattern import Pattern
from stf.typing import PathLike, Shape, TensorLike


@keras.saving.register_keras_serializable(package="stf")
class SparseTransformer(SequenceParallelTrainer, keras.Model):
    """An autoregressive model of byte sequences: logits of every byte from those before it.

        H_0 = embed(x);  H_k = block_k(H_{k-1});  logits = norm(H_N) W_out        (Eqs. 11-15)

    Train it with `compile` and `fit` on (tokens, tokens): the shift by one is inside.

    Examples:
        >>> model = stf.models.SparseTransformer.from_preset("cifar10-small", num_blocks=2)
        >>> model(np.zeros((1, 3072), "int32")).shape
        TensorShape([1, 3072, 256])

    Args:
        length: longest sequence, in tokens.
        position_shape: coordinates of a position, see `stf.layers.SequenceEmbedding`: (32, 32, 3) for images (data
            embedding), (ceil(n / l), l) for text and audio (attention embedding).
        patterns: patterns that the blocks take in turn: `[Local(l), Strided(l)]` interleaves (Eq. 6),
            `[Local(l)] * 3 + [Strided(l)]` at a ratio, `[Fixed(l, c)]` is merged (Eq. 7),
            `[PerHead([...])]` multi-head (Eq. 8).
        num_blocks: N.
        num_heads: heads of each attention layer.
        model_dim: d.
        key_dim: depth of a head's queries and keys; `model_dim / num_heads` unless given.
        value_dim: depth of a head's values; `model_dim / num_heads` unless given.
        ff_dim: width of the feed-forward's hidden layer; `4 model_dim` unless given.
        dropout: rate at the residual additions.
        recompute: what the backward pass computes again: True all of a block (Section 5.4), "attention" all but the
            attention, False nothing. See `stf.layers.SparseResidualStack`.
        vocab_size: number of tokens.
        init: how the paper's N(0, 0.125 / sqrt(fan_in)) is read, see `stf.layers.paper_initializer`.
        seed: of initialisation and dropout.
        conditions: how many values each condition of a sequence has, for a model that is told more than the tokens: its
            class, or the transformation of its image (`stf.data.ImageTransformations`). See
            `stf.layers.SequenceEmbedding`.

    Call arguments:
        inputs: integer tokens `[batch, position]`, below `vocab_size`; or a tuple of those and of the conditions,
            integers `[batch, condition]`, which are all 0 unless given.

    Returns:
        Logits `[batch, position, vocab_size]`, float32 (float64 under that policy).

    Raises:
        ValueError: for arguments that do not fit, tokens that are not integers, and sequences longer than `length`.
    """

    def __init__(
        self,
        length: int,
        position_shape: Sequence[int],
        patterns: Sequence[Pattern | dict[str, Any]],
        num_blocks: int,
        num_heads: int,
        model_dim: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        recompute: bool | Literal["attention"] = False,
        vocab_size: int = 256,
        init: Initialization = "released",
        seed: int | None = None,
        conditions: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"autocast": False} | kwargs)  # of inputs: tokens are no numbers to cast
        length, num_blocks = positive("length", length), positive("num_blocks", num_blocks)
        num_heads, model_dim = positive("num_heads", num_heads), positive("model_dim", model_dim)
        vocab_size = positive("vocab_size", vocab_size)
        if init not in INITIALIZATIONS:
            raise ValueError(f"init must be one of {INITIALIZATIONS}. Received: init={init!r}")
        position_shape = positives("position_shape", position_shape)
        if math.prod(position_shape) < length:
            raise ValueError(
                f"position_shape must cover length={length} positions. Received: position_shape={position_shape!r}"
            )
        if (key_dim is None or value_dim is None) and model_dim % num_heads:
            raise ValueError(
                f"model_dim must be a multiple of num_heads unless key_dim and value_dim are given. "
                f"Received: model_dim={model_dim}, num_heads={num_heads}"
            )
        self.length = length
        self.position_shape = position_shape
        if not isinstance(patterns, list | tuple) or not patterns:
            raise ValueError(f"patterns must be a list of at least one pattern. Received: patterns={patterns!r}")
        self.patterns = [stf_patterns.get(pattern) for pattern in patterns]
        self.num_blocks = num_blocks
        self.num_heads = num_heads
        self.model_dim = model_dim
        self.key_dim = model_dim // num_heads if key_dim is None else positive("key_dim", key_dim)
        self.value_dim = model_dim // num_heads if value_dim is None else positive("value_dim", value_dim)
        self.ff_dim = 4 * model_dim if ff_dim is None else positive("ff_dim", ff_dim)
        self.dropout = dropout
        self.recompute = recompute
        self.vocab_size = vocab_size
        self.init = init
        self.seed = seed = seed_or_none(seed)
        policy = {"dtype": self.dtype_policy}
        self.embedding = SequenceEmbedding(
            vocab_size,
            model_dim,
            self.position_shape,
            init=init,
            seed=seed,
            conditions=conditions,
            name="embedding",
            **policy,
        )
        self.conditions = self.embedding.conditions
        # W2 and W_p are scaled by 1 / sqrt(2 N) (Section 6), so that the residual stream begins at unit size.
        residual = (2 * num_blocks) ** -0.5
        self.stack = SparseResidualStack(
            num_blocks,
            self.patterns,
            num_heads,
            self.key_dim,
            self.value_dim,
            self.ff_dim,
            dropout,
            recompute,
            kernel_initializer=paper_initializer(model_dim, init=init),
            attention_output_initializer=paper_initializer(num_heads * self.value_dim, residual, init),
            output_initializer=paper_initializer(self.ff_dim, residual, init),
            seed=seed,
            name="blocks",
            **policy,
        )
        self.final_norm = keras.layers.LayerNormalization(epsilon=1e-5, name="final_norm", **policy)
        exact = "float64" if self.compute_dtype == "float64" else "float32"
        # W_out begins at 0 (Section 6): the first loss is that of the uniform distribution. Logits are float32 under
        # every policy but float64: bfloat16's steps at their usual size, 0.03, would show in the bits.
        self.logits = keras.layers.Dense(
            vocab_size, use_bias=False, kernel_initializer="zeros", name="logits", dtype=exact
        )
        self.build((None, length))

    @classmethod
    def from_preset(cls, name: PathLike, **overrides: Any) -> Self:
        """The model of a name in `stf.models.PRESETS`, new, or that of a file, with its weights.

        Args:
            name: of a preset, or the path of a `.keras` file: what `model.save` wrote, or a checkpoint, of which the
                moving average of the weights is taken where there is one.
            **overrides: any argument of the model, set otherwise. For a file they must leave the weights' shapes as
                they are: `dropout`, `recompute`, `dtype`, another pattern.

        Returns:
            A `SparseTransformer`, not compiled.

        Raises:
            ValueError: there is no such preset; the file holds another model; overrides change a weight's shape.
        """
        if pathlib.Path(name).suffix != ".keras":
            return cls(**(preset(str(name)) | overrides))
        from stf.training import use_average

        saved = keras.saving.load_model(name)
        if not isinstance(saved, cls):
            raise ValueError(f"{name} must hold a {cls.__name__}. It holds a {type(saved).__name__}")
        use_average(saved)
        model = cls.from_config(saved.get_config() | overrides)
        shapes = [[tuple(weight.shape) for weight in each.weights] for each in (model, saved)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"overrides must leave the shapes of the weights of {name} as they are. Received: {overrides}"
            )
        model.set_weights(saved.get_weights())
        return model

    @property
    def input_dtype(self) -> str:
        """Of tokens, for signatures that Keras makes."""
        return "int32"

    def build(self, input_shape: Shape) -> None:
        """Makes all weights, for `[batch, position]` inputs."""
        hidden = (*input_shape, self.model_dim)
        self.embedding.build(input_shape)
        for layer in (self.stack, self.final_norm, self.logits):
            layer.build(hidden)
        self.built = True

    def compile(
        self,
        optimizer: str | dict[str, Any] | keras.optimizers.Optimizer = "rmsprop",
        *args: Any,
        auto_scale_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        """Keras' `compile`; a mixed_float16 model's optimizer is put into a `stf.training.LossScale`."""
        optimizer = keras.optimizers.get(optimizer)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if auto_scale_loss and self.dtype_policy.name == "mixed_float16" and not scaled and optimizer is not None:
            from stf.training import LossScale

            optimizer = LossScale(optimizer)
        super().compile(optimizer, *args, auto_scale_loss=auto_scale_loss, **kwargs)
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Keras' `fit`, which does not warn that it will not shuffle a data set: those of `stf.data` are shuffled."""
        if not hasattr(x, "__array__") and hasattr(x, "element_spec"):
            kwargs.setdefault("shuffle", False)
        return super().fit(x, *args, **kwargs)

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        """Keras' `make_train_function`; see `without_waiting`."""
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function = without_waiting(self.train_function, self)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        """Keras' `make_test_function`; see `without_waiting`."""
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function = without_waiting(self.test_function, self)
        return self.test_function

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was called with."""
        return super().get_compile_config()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def export(
        self,
        filepath: PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Keras' `export`, whose signature is int32 tokens `[batch, position]` unless given."""
        if input_signature is None:
            input_signature = [keras.InputSpec(shape=(None, None), dtype="int32")]
        return super().export(filepath, format, verbose=verbose, input_signature=input_signature, **kwargs)

    def attention_weights(
        self,
        tokens: TensorLike,
        positions: Sequence[int],
        blocks: Iterable[int] | None = None,
        conditions: TensorLike | None = None,
    ) -> list[list[list[tuple[np.ndarray, np.ndarray]]]]:
        """What chosen queries attend to, block by block; nothing of size n x n is made.

        The query at position t is the one that predicts token t, and key j stands for the tokens before the
        j-th.

        Args:
            tokens: integers `[batch, position]`.
            positions: query positions.
            blocks: indices of the blocks to look at; all unless given.
            conditions: as for a call.

        Returns:
            For each block what `SparseAttention.attention_weights` gives: for each head, for each position,
            keys and weights.
        """
        return introspection.attention_weights(self, tokens, positions, blocks, conditions)

    def features(
        self, tokens: TensorLike, block: int | None = None, batch_size: int = 16, verbose: int = 0
    ) -> npt.NDArray[np.float32]:
        """What a model knows of whole sequences: the mean over positions of a block's normalized output.

        For a linear classifier, a search for what is alike, a map of a data set. The middle of a generative model
        tells more than its end, which is busy with the next token (Chen et al. 2020, "Generative pretraining from
        pixels").

        Args:
            tokens: integers `[sequence, position]`.
            block: behind which block, from 0 on; the middle one unless given.
            batch_size: sequences that go through the model at a time.
            verbose: 1 shows a progress bar.

        Returns:
            float32 NumPy array `[sequence, model_dim]`.

        Raises:
            ValueError: there is no such block; tokens are not integers `[sequence, position]`; a batch_size below 1.
        """
        return introspection.features(self, tokens, block, batch_size, verbose)

    def call(self, inputs: TensorLike | tuple[TensorLike, TensorLike], training: bool | None = None) -> tf.Tensor:
        """Logits; see the class."""
        inputs, conditions = self._checked_inputs(inputs)
        x = self.stack(self.embedding(inputs, conditions), training=training)
        return self.logits_of(x)

    def parallel_call(
        self,
        inputs: TensorLike | tuple[TensorLike, TensorLike],
        devices: list[str],
        training: bool | None,
        finish: Callable[[int, int, tf.Tensor], Any],
    ) -> list[Any]:
        """The model on several devices, each with some of the positions: for `stf.distribution.SequenceParallel`.

        Args:
            inputs: as for a call; the number of positions must be static.
            devices: names of the devices.
            training: whether to drop, and whether a gradient will be asked for.
            finish: function of `begin`, `end` and the logits of the positions from `begin` to `end`, called on the
                device that has them; what it returns is differentiated there.

        Returns:
            What `finish` returned, of each device that has positions.
        """
        own = next(cls for cls in type(self).__mro__ if "call" in vars(cls) or "parallel_call" in vars(cls))
        if "parallel_call" not in vars(own):
            raise ValueError(
                "A model with a `call` of its own must have a `parallel_call` of its own where several devices share a "
                f"sequence. Received: {own.__name__}"
            )
        tokens, conditions = self._checked_inputs(inputs)
        return on_devices(self, tokens, conditions, devices, training, finish)

    def logits_of(self, stream: tf.Tensor) -> tf.Tensor:
        """Logits of what the blocks give."""
        return self.logits(tf.cast(self.final_norm(stream), self.logits.compute_dtype))

    def _checked_inputs(self, inputs):
        """Tokens and conditions of what the model is called with; ValueError where they are none."""
        inputs, conditions = self._tokens_and_conditions(inputs)
        if not tf.as_dtype(inputs.dtype).is_integer:
            raise ValueError(
                f"inputs must be integer tokens. Received: inputs of dtype {tf.as_dtype(inputs.dtype).name}"
            )
        if inputs.shape[1] is not None and inputs.shape[1] > self.length:
            raise ValueError(
                f"inputs must have at most length={self.length} positions. Received: inputs of shape {inputs.shape}"
            )
        return inputs, conditions

    def _tokens_and_conditions(self, inputs):
        """The parts of what the model is called with; conditions are None where they are not given."""
        if not isinstance(inputs, tuple | list):
            return inputs, None
        if len(inputs) != 2 or not self.conditions:
            raise ValueError(
                f"inputs must be tokens{', or tokens and conditions' if self.conditions else ''}: the model has "
                f"conditions={self.conditions}. Received: {len(inputs)} inputs"
            )
        return tuple(inputs)

    def compute_output_spec(
        self, inputs: TensorLike | tuple[TensorLike, TensorLike], training: bool | None = None
    ) -> keras.KerasTensor:
        """Shape and dtype of the logits, for symbolic calls."""
        tokens, _ = self._tokens_and_conditions(inputs)
        return keras.KerasTensor((*tokens.shape, self.vocab_size), self.logits.compute_dtype)

    def generate(
        self,
        batch_size: int = 1,
        temperature: float = 1.0,
        prefix: TensorLike | None = None,
        length: int | None = None,
        seed: int | None = None,
        top_k: int | None = None,
        verbose: int = 1,
        top_p: float | None = None,
        stop: int | Sequence[int] | None = None,
        callback: Callable[[np.ndarray], Any] | None = None,
        cache_dtype: str | None = None,
        conditions: TensorLike | None = None,
    ) -> npt.NDArray[np.int32]:
        """Draws samples, or completes prefixes: the prefix in one pass, then one token after another, with caches.

        The loop over tokens is compiled, once for each batch size and length. See `stf.generation.Sampler` for drawing
        bit by bit.

        Args:
            batch_size: number of samples, where no prefix says it.
            temperature: divides the logits; 0 takes the likeliest token.
            prefix: integer tokens `[position]` or `[batch, position]` that the samples begin with.
            length: tokens of a sample, the prefix included; the model's unless given.
            seed: of the draws, an int from 0 to 2**32 - 1; the same seed draws the same samples.
            top_k: draw from the k likeliest tokens only.
            verbose: 1 shows a progress bar, 2 also says how many bytes the caches have.
            top_p: draw from the fewest likeliest tokens whose probabilities add up to p or more.
            stop: a token or several: a sample ends behind the first that it draws, and repeats it from there on.
            callback: function that is given what was drawn, int32 `[batch, position]`, every so many tokens.
            cache_dtype: of the keys and values that are kept; the dtype that the model computes in unless given.
            conditions: integers `[condition]` or `[batch, condition]`, of a model that has them; all 0 unless given.

        Returns:
            int32 NumPy array `[batch, length]`; with `stop` as long as the longest sample.
        """
        from stf.generation import generate

        return generate(
            self,
            verbose,
            callback,
            batch_size=batch_size,
            temperature=temperature,
            prefix=prefix,
            length=length,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            cache_dtype=cache_dtype,
            conditions=conditions,
        )

    def score(self, tokens: TensorLike, batch_size: int = 16, verbose: int = 0) -> npt.NDArray[np.float32]:
        """The log-likelihood of each token given those before it, in nats.

        Args:
            tokens: integers `[sequence, position]`, or `[position]`.
            batch_size: sequences that go through the model at a time.
            verbose: 1 shows a progress bar.

        Returns:
            float32 NumPy array like `tokens`.
        """
        from stf.evaluation import score

        return score(self, tokens, batch_size, verbose)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {
            "length": self.length,
            "position_shape": list(self.position_shape),
            "patterns": [stf_patterns.serialize(pattern) for pattern in self.patterns],
            "num_blocks": self.num_blocks,
            "num_heads": self.num_heads,
            "model_dim": self.model_dim,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "ff_dim": self.ff_dim,
            "dropout": self.dropout,
            "recompute": self.recompute,
            "vocab_size": self.vocab_size,
            "init": self.init,
            "seed": self.seed,
            "conditions": self.conditions,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """The model of a configuration."""
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.saving.deserialize_keras_object(config["dtype"])
        return cls(**config)
