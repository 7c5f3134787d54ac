"""A stack of residual blocks whose weights are stacked, run by one loop."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from stf import ops
from stf import patterns as stf_patterns
from stf.distribution.exchanges import broadcast
from stf.distribution.replicas import next_seed
from stf.layers.attention import SparseAttention
from stf.layers.block import Block, BlockWeights, folded
from stf.layers.dropout import SavedSeed
from stf.layers.initialization import seeded
from stf.layers.parallel_blocks import ParallelBlocks
from stf.layers.residual_block import SparseResidualBlock
from stf.layers.residual_loop import ResidualLoop
from stf.layers.validation import above_zero, positive, rate, seed_or_none
from stf.patterns.pattern import Pattern
from stf.typing import Initializer, Shape, TensorLike

RECOMPUTE = (False, "attention", True)


@keras.saving.register_keras_serializable(package="stf")
class SparseResidualStack(SavedSeed, keras.layers.Layer):
    """N `SparseResidualBlock`s in a row, as one layer (Child et al. 2019, Eqs. 11-14).

    Each weight of all blocks is one variable `[block, ...]`. In training in half precision on a GPU one op runs the
    blocks (`stf.ops.residual_stack`); everywhere else a loop over the period of the patterns. So neither tracing, nor
    XLA's compilation, nor the optimizer's number of variables grows with the depth. What a training step keeps for the
    backward pass is chosen here and not left to the compiler:

    | `recompute` | kept of a block | computed again |
    |---|---|---|
    | `True` (Section 5.4) | its input (the op: every second block's) | all of it |
    | `"attention"` | its input, the attention's output and log-sum-exp | all but the attention |
    | `False` | query, key, value, attention's output, H + a, hidden layer (the op: norms, activations too) | the rest |

    Gradients are the same to rounding in all three. Unlike a block's own layer, a stack takes no lengths and no masks.

    Examples:
        >>> patterns = [stf.patterns.Local(32), stf.patterns.Strided(32)]
        >>> stack = stf.layers.SparseResidualStack(4, patterns, num_heads=2, key_dim=16, recompute=True)
        >>> stack(tf.zeros([1, 1024, 64])).shape
        TensorShape([1, 1024, 64])

    Args:
        num_blocks: N.
        patterns: patterns, or their configs, that the blocks take in turn.
        num_heads: heads of each attention.
        key_dim: depth of each head's query and key.
        value_dim: depth of each head's value; `key_dim` unless given.
        ff_dim: number of hidden units of the feed-forward layers; `4 model_dim` unless given.
        dropout: rate at both residual additions of a block, from 0 to less than 1.
        recompute: see above.
        epsilon: of the normalizations.
        kernel_initializer: of query, key, value and W1 kernels, each drawn for itself as `[fan_in, units]`.
        attention_output_initializer: of the attentions' output kernels; `kernel_initializer` unless given.
        output_initializer: of W2; `kernel_initializer` unless given.
        bias_initializer: of all biases.
        seed: int that fixes dropout and initial values, or None.

    Call arguments:
        inputs: H_0, `[batch, position, model_dim]`.
        training: whether to drop.

    Returns:
        H_N, `[batch, position, model_dim]`.

    Raises:
        ValueError: for arguments that do not fit.
    """

    def __init__(
        self,
        num_blocks: int,
        patterns: Sequence[Pattern | dict[str, Any]],
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        recompute: bool | Literal["attention"] = False,
        epsilon: float = 1e-5,
        kernel_initializer: Initializer = "glorot_uniform",
        attention_output_initializer: Initializer | None = None,
        output_initializer: Initializer | None = None,
        bias_initializer: Initializer = "zeros",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_blocks = positive("num_blocks", num_blocks)
        if not isinstance(patterns, list | tuple) or not patterns:
            raise ValueError(f"`patterns` must be a list of at least one pattern. Received: patterns={patterns!r}")
        self.patterns = [stf_patterns.get(pattern) for pattern in patterns]
        self.num_heads = positive("num_heads", num_heads)
        for pattern in self.patterns:
            pattern.check_heads(self.num_heads)
        self.key_dim = positive("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else positive("value_dim", value_dim)
        self.ff_dim = None if ff_dim is None else positive("ff_dim", ff_dim)
        if not isinstance(recompute, bool) and recompute != "attention":
            raise ValueError(f"`recompute` must be one of {RECOMPUTE}. Received: recompute={recompute!r}")
        self.dropout = rate("dropout", dropout)
        self.recompute = recompute
        self.epsilon = above_zero("epsilon", epsilon)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.attention_output_initializer = keras.initializers.get(attention_output_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.seed = seed_or_none(seed)
        self.seed_generator = keras.random.SeedGenerator(self.seed) if self.dropout else None

    def pattern(self, index: int) -> Pattern:
        """The pattern of a block."""
        return self.patterns[index % len(self.patterns)]

    def build(self, inputs_shape: Shape) -> None:
        width = inputs_shape[-1]
        hidden = 4 * width if self.ff_dim is None else self.ff_dim
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        kernel, bias = self.kernel_initializer, self.bias_initializer
        combining = self.attention_output_initializer or kernel
        output = self.output_initializer or kernel
        self._stacked = {
            "attention_norm_gamma": self._vector("attention_norm_gamma", "ones", 9, width),
            "attention_norm_beta": self._vector("attention_norm_beta", "zeros", 10, width),
            "projection_kernel": self._kernel("projection_kernel", kernel, 0, width, keys, keys, values),
            "projection_bias": self._vector("projection_bias", bias, 6, keys, keys, values),
            "attention_output_kernel": self._kernel("attention_output_kernel", combining, 3, values, width),
            "attention_output_bias": self._vector("attention_output_bias", bias, 11, width),
            "feed_forward_norm_gamma": self._vector("feed_forward_norm_gamma", "ones", 12, width),
            "feed_forward_norm_beta": self._vector("feed_forward_norm_beta", "zeros", 13, width),
            "hidden_kernel": self._kernel("hidden_kernel", kernel, 4, width, hidden),
            "hidden_bias": self._vector("hidden_bias", bias, 14, hidden),
            "output_kernel": self._kernel("output_kernel", output, 5, hidden, width),
            "output_bias": self._vector("output_bias", bias, 15, width),
        }

    def _kernel(self, name, initializer, number, fan_in, *units):
        """The kernels of all blocks, side by side where a block has several: `[block, fan_in, sum of units]`."""
        return self._stack_variable(name, initializer, number, [(fan_in, size) for size in units])

    def _vector(self, name, initializer, number, *units):
        return self._stack_variable(name, initializer, number, [(size,) for size in units])

    def _stack_variable(self, name, initializer, number, shapes):
        """A weight of all blocks, whose parts lie side by side; each part of each block is drawn for itself."""
        initializer = keras.initializers.get(initializer)
        seed = getattr(initializer, "seed", None) if self.seed is None else self.seed
        seed = seed if isinstance(seed, int) else None

        def draw(shape, dtype=None):
            def one(block, part):
                of_block = None if seed is None else seed + 1_000_003 * (block + 1)
                return seeded(initializer, of_block, number + part)(shapes[part], dtype=dtype)

            return tf.stack([tf.concat([one(k, part) for part in range(len(shapes))], -1) for k in range(shape[0])])

        # Not cast by Keras: `stacked_weights` casts, after what is to be computed in float32.
        shape = (self.num_blocks, *shapes[0][:-1], sum(part[-1] for part in shapes))
        variable = self.add_weight(name=name, shape=shape, initializer=draw, autocast=False)
        variable.stacked_axes = 1  # what a recipe asks of a weight's rank, it asks of a block's own: see stf.training
        return variable

    def stacked_weights(self, index: int | None = None) -> BlockWeights:
        """`stf.layers.block.BlockWeights` of all blocks `[block, ...]`, or of one; kernels in the dtype computed in."""
        whole = self._folded_weights(index)
        return BlockWeights(*map(tf.cast, whole, self._dtypes_computed_in(whole)))

    def _dtypes_computed_in(self, weights):
        """Of `BlockWeights`: a kernel's is the layer's, a bias' its own."""
        return BlockWeights(*(x.dtype if at % 2 else self.compute_dtype for at, x in enumerate(weights)))

    def _folded_weights(self, index=None):
        """`stacked_weights`, all in the variables' dtype."""
        w = {
            name: tf.convert_to_tensor(variable.value) if index is None else variable.value[index]
            for name, variable in self._stacked.items()
        }
        projection = folded(
            w["attention_norm_gamma"], w["attention_norm_beta"], w["projection_kernel"], w["projection_bias"]
        )
        hidden = folded(w["feed_forward_norm_gamma"], w["feed_forward_norm_beta"], w["hidden_kernel"], w["hidden_bias"])
        combining = w["attention_output_kernel"], w["attention_output_bias"]
        pairs = (projection, combining, hidden, (w["output_kernel"], w["output_bias"]))
        return BlockWeights(*itertools.chain(*pairs))

    def block(self, index: int) -> Block:
        """One block as functions of its own weights, which are copies: a `stf.layers.block.Block`.

        For looking at a block, and for running blocks one by one (generation, attention maps).
        """
        self._check_index(index)
        return self.make_block(index, self.stacked_weights(index))

    def make_block(self, index: int, weights: BlockWeights) -> Block:
        """Block `index` of `BlockWeights` that are at hand, such as slices of `stacked_weights`."""
        return Block(
            weights, self.pattern(index), self.num_heads, self.key_dim, self.value_dim, self.dropout, self.epsilon
        )

    def _check_index(self, index):
        if not 0 <= index < self.num_blocks:
            raise ValueError(f"`index` must be from 0 to {self.num_blocks - 1}. Received: index={index}")

    def get_block_weights(self, index: int) -> dict[str, np.ndarray]:
        """The weights of a block: a dictionary of NumPy arrays by name, query, key and value apart."""
        self._check_index(index)
        weights = {name: np.array(variable[index]) for name, variable in self._stacked.items()}
        keys = self.num_heads * self.key_dim
        for kind in ("kernel", "bias"):
            parts = np.split(weights.pop(f"projection_{kind}"), [keys, 2 * keys], axis=-1)
            weights |= {f"{name}_{kind}": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
        return weights

    def set_block_weights(self, index: int, weights: Mapping[str, np.ndarray]) -> None:
        """Sets weights of a block: a dictionary as `get_block_weights` gives it, or some of its entries.

        Raises:
            ValueError: for a name or a shape that the block does not have.
        """
        held = self.get_block_weights(index)
        for name, value in weights.items():
            if name not in held or held[name].shape != np.shape(value):
                shapes = {name: value.shape for name, value in held.items()}
                raise ValueError(
                    f"`weights` must have names and shapes of {shapes}. Received: {name!r} of shape {np.shape(value)}"
                )
        held |= weights
        for kind in ("kernel", "bias"):
            held[f"projection_{kind}"] = np.concatenate(
                [held[f"{name}_{kind}"] for name in ("query", "key", "value")], -1
            )
        for name, variable in self._stacked.items():
            value = np.array(variable)
            value[index] = held[name]
            variable.assign(value)

    def as_layer(self, index: int) -> SparseResidualBlock:
        """A `SparseResidualBlock` with copies of a block's weights."""
        self._check_index(index)
        options = {"dtype": self.dtype_policy}
        attention = SparseAttention(self.num_heads, self.key_dim, self.pattern(index), self.value_dim, **options)
        layer = SparseResidualBlock(
            attention, self.ff_dim, self.dropout, bool(self.recompute), self.epsilon, seed=self.seed, **options
        )
        layer.build((None, None, self._stacked["attention_norm_gamma"].shape[-1]))
        held = self.get_block_weights(index)
        layers = {
            "query": attention.query_dense,
            "key": attention.key_dense,
            "value": attention.value_dense,
            "attention_output": attention.output_dense,
            "hidden": layer.hidden_dense,
            "output": layer.output_dense,
        }
        for name, dense in layers.items():
            dense.kernel.assign(held[f"{name}_kernel"].reshape(dense.kernel.shape))
            dense.bias.assign(held[f"{name}_bias"].reshape(dense.bias.shape))
        for name, norm in (("attention", layer.attention_norm), ("feed_forward", layer.feed_forward_norm)):
            norm.gamma.assign(held[f"{name}_norm_gamma"])
            norm.beta.assign(held[f"{name}_norm_beta"])
        return layer

    def call(self, inputs: TensorLike, training: bool | None = None) -> tf.Tensor:
        drops = training and self.seed_generator is not None
        seed = next_seed(self.seed_generator) if drops else None
        weights = self.stacked_weights()
        if training and self.runs_as_one_op(inputs):
            return ops.residual_stack(
                inputs,
                weights,
                seed,
                [self.pattern(index) for index in range(self.period)],
                self.num_heads,
                self.key_dim,
                self.dropout,
                self.epsilon,
                self.recompute,
            )
        run = ResidualLoop(self.make_block, weights, self.period, self.recompute, seed)
        return run.differentiable(inputs) if training else run(inputs)

    def runs_as_one_op(self, inputs: TensorLike) -> bool:
        """Whether a training step is the GPU's op, and not a loop of TensorFlow's."""
        hidden = self._stacked["hidden_kernel"].shape[-1]
        return ops.runs_residual_stack(inputs, hidden, self.num_heads, self.key_dim, self.value_dim)

    def parallel(
        self, streams: list[tf.Tensor], devices: list[str], positions: int, training: bool | None = None
    ) -> list[tf.Tensor]:
        """The stack on several devices, each of which has some of the positions: see `stf.layers.parallel_blocks`.

        Args:
            streams: for each device `[batch, m, model_dim]` of its m positions, in the sequence's order; the last ones
                may have padding at their end.
            devices: names of the devices.
            positions: of a sequence, without padding; m is as `stf.patterns.partition.positions_of_device` says.
            training: whether to drop, and whether a gradient will be asked for.

        Returns:
            The same of the outputs. Differentiable once, the same bits every run.
        """
        seed = None if not training or self.seed_generator is None else next_seed(self.seed_generator)
        whole = self._folded_weights()
        weights = broadcast(whole, self._dtypes_computed_in(whole), devices)
        run = ParallelBlocks(self, devices, positions, streams[0].shape[1], seed)
        return run(streams, weights, training)

    @property
    def period(self) -> int:
        """The fewest blocks after which the patterns begin again."""
        of_blocks = [self.pattern(index) for index in range(self.num_blocks)]
        for period in range(1, self.num_blocks):
            if of_blocks[period:] == of_blocks[:-period]:
                return period
        return self.num_blocks

    def hidden(self, inputs: TensorLike) -> Iterator[tf.Tensor]:
        """The residual stream outside training: the inputs, then the output of each block, one after another."""
        yield inputs
        for index in range(self.num_blocks):
            inputs = self.block(index)(inputs)
            yield inputs

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return inputs_shape

    def compute_output_spec(self, inputs: TensorLike, **kwargs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return super().get_config() | {
            "num_blocks": self.num_blocks,
            "patterns": [stf_patterns.serialize(pattern) for pattern in self.patterns],
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "ff_dim": self.ff_dim,
            "dropout": self.dropout,
            "recompute": self.recompute,
            "epsilon": self.epsilon,
            "kernel_initializer": serialize(self.kernel_initializer),
            "attention_output_initializer": serialize(self.attention_output_initializer),
            "output_initializer": serialize(self.output_initializer),
            "bias_initializer": serialize(self.bias_initializer),
            "seed": self.seed,
        }
