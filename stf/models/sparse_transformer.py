"""The Sparse Transformer (Child et al. 2019, Section 5)."""

import math

import keras
import tensorflow as tf

from stf import patterns as stf_patterns
from stf.layers import SequenceEmbedding, SparseAttention, SparseResidualBlock, paper_initializer
from stf.models.compiled_blocks import CompiledBlocks
from stf.models.presets import preset


@keras.saving.register_keras_serializable(package="stf")
class SparseTransformer(keras.Model):
    """An autoregressive model of byte sequences: logits of every byte from those before it.

        H_0 = embed(x);  H_k = block_k(H_{k-1});  logits = norm(H_N) W_out        (Eqs. 11-15)

    Train it with `compile` and `fit` on (tokens, tokens): the shift by one is inside.

    Example:
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
        recompute: keep one residual a block and compute the rest again in the backward pass.
        vocab_size: number of tokens.
        init: how the paper's N(0, 0.125 / sqrt(fan_in)) is read, see `stf.layers.paper_initializer`.
        seed: of initialisation and dropout.
        compile_blocks: whether XLA compiles the blocks, each kind of them once. (`compile(jit_compile=True)` compiles
            the whole step as one program, which takes minutes for a deep model.)

    Call arguments:
        inputs: integer tokens `[batch, position]`.

    Returns:
        Logits `[batch, position, vocab_size]`, float32.
    """

    def __init__(
        self,
        length,
        position_shape,
        patterns,
        num_blocks,
        num_heads,
        model_dim,
        key_dim=None,
        value_dim=None,
        ff_dim=None,
        dropout=0.0,
        recompute=False,
        vocab_size=256,
        init="released",
        seed=None,
        compile_blocks=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, number in (("length", length), ("num_blocks", num_blocks), ("model_dim", model_dim)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1. Received: {name}={number!r}")
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
        self.position_shape = tuple(position_shape)
        self.patterns = [stf_patterns.get(pattern) for pattern in patterns]
        if not self.patterns:
            raise ValueError("patterns must hold at least one pattern. Received: patterns=[]")
        self.num_blocks = num_blocks
        self.num_heads = num_heads
        self.model_dim = model_dim
        self.key_dim = key_dim or model_dim // num_heads
        self.value_dim = value_dim or model_dim // num_heads
        self.ff_dim = ff_dim or 4 * model_dim
        self.dropout = dropout
        self.recompute = recompute
        self.vocab_size = vocab_size
        self.init = init
        self.seed = seed
        self.compile_blocks = compile_blocks
        self._compiled_blocks = CompiledBlocks()
        policy = {"dtype": self.dtype_policy}
        self.embedding = SequenceEmbedding(
            vocab_size, model_dim, self.position_shape, reading=init, seed=seed, name="embedding", **policy
        )
        self.blocks = [self._block(index, policy) for index in range(num_blocks)]
        self.final_norm = keras.layers.LayerNormalization(epsilon=1e-5, name="final_norm", **policy)
        # W_out begins at 0 (Section 6): the first loss is that of the uniform distribution.
        self.logits = keras.layers.Dense(
            vocab_size, use_bias=False, kernel_initializer="zeros", name="logits", **policy
        )
        self.build((None, length))

    @classmethod
    def from_preset(cls, name, **overrides):
        """The model of a name in `stf.models.PRESETS`, with any argument set otherwise."""
        return cls(**(preset(name) | overrides))

    def _block(self, index, policy):
        # W2 and W_p are scaled by 1 / sqrt(2 N) (Section 6), so that the residual stream begins at unit size.
        residual = (2 * self.num_blocks) ** -0.5
        seed = None if self.seed is None else self.seed + 1_000_003 * (index + 1)
        attention = SparseAttention(
            self.num_heads,
            self.key_dim,
            self.patterns[index % len(self.patterns)],
            value_dim=self.value_dim,
            kernel_initializer=paper_initializer(self.model_dim, reading=self.init),
            output_initializer=paper_initializer(self.num_heads * self.value_dim, residual, self.init),
            seed=seed,
            name="attention",
            **policy,
        )
        return SparseResidualBlock(
            attention,
            ff_dim=self.ff_dim,
            dropout=self.dropout,
            recompute=self.recompute,
            kernel_initializer=paper_initializer(self.model_dim, reading=self.init),
            output_initializer=paper_initializer(self.ff_dim, residual, self.init),
            seed=None if seed is None else seed + 500_001,
            name=f"block_{index}",
            **policy,
        )

    def build(self, input_shape):
        """Makes all weights, for `[batch, position]` inputs."""
        hidden = (*input_shape, self.model_dim)
        self.embedding.build(input_shape)
        for layer in (*self.blocks, self.final_norm, self.logits):
            layer.build(hidden)
        self.built = True

    def hidden(self, inputs, training=None):
        """The residual stream: the embedded input, then the output of each block, as a list."""
        found = [self.embedding(inputs)]
        for index, block in enumerate(self.blocks):
            if self.compile_blocks:
                pattern = self.patterns[index % len(self.patterns)]
                found.append(self._compiled_blocks(pattern, block, found[-1], training))
            else:
                found.append(block(found[-1], training=training))
        return found

    def attention_weights(self, tokens, positions, blocks=None):
        """What chosen queries attend to, block by block; nothing of size n x n is made.

        The query at position t is the one that predicts token t, and key j stands for the tokens before the
        j-th.

        Args:
            tokens: integers `[batch, position]`.
            positions: query positions.
            blocks: indices of the blocks to look at; all unless given.

        Returns:
            For each block what `SparseAttention.attention_weights` gives: for each head, for each position,
            keys and weights.
        """
        hidden = self.hidden(tf.convert_to_tensor(tokens))
        blocks = range(self.num_blocks) if blocks is None else blocks
        return [
            self.blocks[k].attention.attention_weights(self.blocks[k].attention_norm(hidden[k]), positions)
            for k in blocks
        ]

    def call(self, inputs, training=None):
        """Logits; see the class."""
        if inputs.shape[1] is not None and inputs.shape[1] > self.length:
            raise ValueError(
                f"inputs must have at most length={self.length} positions. Received: inputs of shape {inputs.shape}"
            )
        x = self.hidden(inputs, training=training)[-1]
        return tf.cast(self.logits(self.final_norm(x)), tf.float32)

    def compute_output_spec(self, inputs, training=None):
        """Shape and dtype of the logits, for symbolic calls."""
        if not self.built:
            self.build(inputs.shape)
        return keras.KerasTensor((*inputs.shape, self.vocab_size), "float32")

    def generate(
        self,
        batch_size=1,
        temperature=1.0,
        prefix=None,
        length=None,
        seed=None,
        top_k=None,
        verbose=1,
        top_p=None,
    ):
        """Draws samples, or completes prefixes, one token after another, with caches.

        Args:
            batch_size: number of samples, where no prefix says it.
            temperature: divides the logits; 0 takes the likeliest token.
            prefix: integer tokens `[batch, position]` that the samples begin with.
            length: tokens of a sample, the prefix included; the model's unless given.
            seed: of the draws; the same seed draws the same samples.
            top_k: draw from the k likeliest tokens only.
            verbose: 1 shows a progress bar.
            top_p: draw from the fewest likeliest tokens whose probabilities add up to p or more.

        Returns:
            int32 NumPy array `[batch, length]`.
        """
        from stf.generation import generate

        return generate(self, batch_size, temperature, prefix, length, seed, top_k, verbose, top_p)

    def get_config(self):
        """The constructor's arguments."""
        names = "length num_blocks num_heads model_dim key_dim value_dim ff_dim dropout recompute vocab_size init seed"
        names += " compile_blocks"
        return super().get_config() | {
            **{name: getattr(self, name) for name in names.split()},
            "position_shape": list(self.position_shape),
            "patterns": [stf_patterns.serialize(pattern) for pattern in self.patterns],
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The model of a configuration."""
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.saving.deserialize_keras_object(config["dtype"])
        return cls(**config)
