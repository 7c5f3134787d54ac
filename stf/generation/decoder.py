"""A model one position at a time, or a prefix at once: logits and caches, as functions that a graph's loop can call."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tensorflow as tf

from stf import ops
from stf.generation.cache import KeyValueCache
from stf.generation.categorical import draw
from stf.layers.block import BlockWeights
from stf.layers.validation import positive
from stf.typing import TensorLike

if TYPE_CHECKING:
    from stf.models import SparseTransformer

UNROLLED = 8  # blocks of a model up to which they are run without a loop


class Decoder:
    """Runs a `SparseTransformer` by parts, with caches of as much as its patterns still read.

    Prefix and steps are compiled by XLA once for each decoder; it holds no tensors of a sample, so that one decoder
    serves any number of them. Logits equal those of the whole sequence up to rounding.

    Args:
        model: a built `SparseTransformer`.
        batch_size: sequences side by side.
        length: positions to make room for.
        cache_dtype: of keys and values; the dtype that the model computes in unless given.

    Attributes:
        caches: a `KeyValueCache` of each of the model's patterns, which its blocks take in turn.
    """

    def __init__(
        self, model: "SparseTransformer", batch_size: int, length: int, cache_dtype: str | None = None
    ) -> None:
        length = positive("length", length)
        if length > model.length:
            raise ValueError(f"length must be from 1 to the model's {model.length}. Received: length={length}")
        self.model, self.length = model, length
        self.batch_size = positive("batch_size", batch_size)
        self.cache_dtype = tf.as_dtype(cache_dtype or model.compute_dtype)
        stack = model.stack
        self._period = stack.period
        self._periods = model.num_blocks // self._period
        self.caches = [
            KeyValueCache(
                stack.pattern(k),
                model.num_heads,
                length,
                model.key_dim,
                model.value_dim,
                layers=len(range(k, model.num_blocks, self._period)),
            )
            for k in range(self._period)
        ]
        self._prefill = tf.function(self._fill, jit_compile=True)
        self._one_step = tf.function(lambda *x: self._step(self.model.stack.stacked_weights(), *x), jit_compile=True)
        self._several = tf.function(self._draw, jit_compile=True)

    @property
    def bytes(self) -> int:
        """Bytes of the caches of a batch."""
        return sum(cache.bytes(self.batch_size, self.cache_dtype) for cache in self.caches)

    def zeros(self) -> list[list[tf.Tensor]]:
        """The state before the first position: a list, for each cache, of its tensors."""
        return [cache.zeros(self.batch_size, self.cache_dtype) for cache in self.caches]

    def prefill(self, tokens: TensorLike, conditions: TensorLike | None = None) -> list[list[tf.Tensor]]:
        """The state when a prefix has been read, in one pass over all of its positions.

        Args:
            tokens: integers `[batch, position]`, of which there may be none.
            conditions: int32 `[batch, condition]`, of a model that has them; all 0 unless given.

        Returns:
            The state at position `tokens.shape[1]`.
        """
        count = tokens.shape[1]
        if count == 0:
            return self.zeros()
        padded = tf.pad(tf.cast(tokens, tf.int32), [[0, 0], [0, self._padded(count) - count]])
        return self._prefill(padded, tf.constant(count), conditions)

    def step(
        self,
        state: list[list[tf.Tensor]],
        token: TensorLike,
        position: int | tf.Tensor,
        conditions: TensorLike | None = None,
    ) -> tuple[tf.Tensor, list[list[tf.Tensor]]]:
        """One position: its logits `[batch, vocab_size]`, and the state behind it.

        Args:
            state: what the positions before left.
            token: int32 `[batch]`, the token before it; at position 0 it does not matter.
            position: from 0.
            conditions: as for `prefill`.
        """
        if not 0 <= position < self.length:
            raise ValueError(f"position must be from 0 to {self.length - 1}. Received: position={position}")
        token, position = tf.convert_to_tensor(token, tf.int32), tf.constant(position, tf.int32)
        return self._one_step(state, token, position, conditions)

    def draw(
        self,
        state: list[list[tf.Tensor]],
        token: TensorLike,
        ended: TensorLike,
        position: int | tf.Tensor,
        count: int,
        seed: TensorLike,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[int] = (),
        most: int = 64,
        conditions: TensorLike | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, list[list[tf.Tensor]]]:
        """Draws tokens one after another, without Python between them.

        Args:
            state: what the positions before left.
            token: int32 `[batch]`, the token before.
            ended: bool `[batch]`, of which samples the end has been drawn: they repeat their last token.
            position: of the first token to draw.
            count: of tokens, `most` or fewer.
            seed: of the draws.
            temperature, top_k, top_p: see `draw`.
            stop: tokens behind which a sample ends.
            most: for how many the function is compiled.
            conditions: as for `prefill`.

        Returns:
            Tokens `[batch, most]`; how many of each row were drawn, fewer than `count` where all samples have ended;
            which samples have ended; the state.
        """
        if not 0 < count <= most or not 0 <= position <= self.length - count:
            raise ValueError(
                f"count must be from 1 to most={most}, and position + count at most {self.length}. "
                f"Received: position={position}, count={count}"
            )
        filters = top_k is not None or top_p is not None
        return self._several(
            state,
            tf.convert_to_tensor(token, tf.int32),
            tf.convert_to_tensor(ended, tf.bool),
            tf.constant(position, tf.int32),
            tf.constant(count, tf.int32),
            tf.constant(seed, tf.int64),
            tf.constant(temperature, tf.float32),
            tf.constant(self.model.vocab_size if top_k is None else top_k, tf.int32),
            tf.constant(1.0 if top_p is None else top_p, tf.float32),
            tf.constant(list(stop), tf.int32),
            filters,
            most,
            conditions,
        )

    def _padded(self, count):
        """Positions that a prefix is padded to: few are compiled, and a layout of blocks serves only its own."""
        for n in (*(math.ceil(self.length / part) for part in (8, 4, 2, 1)), self.model.length):
            if n >= count and all(serves(self.model.stack.pattern(k), n) for k in range(self._period)):
                return n
        raise ValueError(
            f"the model's patterns must serve its length={self.model.length}. Received: {self.model.patterns}"
        )

    def _over_blocks(self, run, weights, x, state):
        """`run(block, cache, layer, x, tensors)`, which gives `x` and tensors, for all blocks in turn."""
        stack, state = self.model.stack, list(state)
        looped = self._periods if self.model.num_blocks > UNROLLED and self._periods > 1 else 0

        def one(i, k, x, state):
            of_block = BlockWeights(*(weight[i * self._period + k] for weight in weights))
            x, state[k] = run(stack.make_block(k, of_block), self.caches[k], i, x, state[k])
            return x, state

        if looped:

            def body(i, x, state):
                for k in range(self._period):
                    x, state = one(i, k, x, list(state))
                return i + 1, x, state

            _, x, state = tf.while_loop(lambda i, *_: i < looped, body, (0, x, state), maximum_iterations=looped)
        for index in range(looped * self._period, self.model.num_blocks):
            x, state = one(*divmod(index, self._period), x, list(state))
        return x, state

    def _logits(self, x):
        model = self.model
        return model.logits(tf.cast(model.final_norm(x), model.logits.compute_dtype))

    def _step(self, weights, state, token, position, conditions):
        """Logits of a position and the state behind it: by the op where it runs, else by TensorFlow's own."""
        embedded = self.model.embedding.step(token, position, conditions)
        part_reads = [cache.part_reads for cache in self.caches]
        sizes = weights.hidden_kernel.shape[1:] + (self.model.key_dim, self.model.value_dim)
        if ops.runs_residual_stack_decode(weights.hidden_kernel.dtype, self.cache_dtype, sizes, part_reads):
            x, state = self._step_by_op(weights, part_reads, state, embedded, position)
        else:
            x, state = self._step_by_blocks(weights, state, embedded, position)
        return self._logits(x)[: self.batch_size, 0], state

    def _step_by_op(self, weights, part_reads, state, embedded, position):
        model, tensors = self.model, list(itertools.chain(*state))
        x, keys, values = ops.residual_stack_decode(
            embedded[:, 0],
            weights,
            part_reads,
            tf.concat([cache.reads(position) for cache in self.caches], 0),
            tf.concat([cache.writes(position) for cache in self.caches], 0),
            tensors[0::2],
            tensors[1::2],
            model.num_heads,
            model.key_dim,
            model.stack.epsilon,
        )
        tensors = iter(itertools.chain(*zip(keys, values, strict=True)))
        state = [[next(tensors) for _ in of_cache] for of_cache in state]
        return x[:, None], state

    def _step_by_blocks(self, weights, state, embedded, position):
        def run(block, cache, layer, x, tensors):
            projected = block.split(block.query_key_value(x))
            query, key, value = (part[: self.batch_size, 0] for part in projected)
            tensors = cache.write(tensors, key, value, position, layer)
            heads = cache.attend(tensors, query, position, layer=layer)
            x = block.add_attention(x, rows(heads)[:, None])
            return block.add_feed_forward(x, block.hidden(x)), tensors

        # XLA's product of one row by a matrix is six times slower on a CPU than that of two.
        alone = self.batch_size == 1 and not tf.config.list_logical_devices("GPU")
        rows = (lambda x: tf.repeat(x, 2, 0)) if alone else tf.identity
        return self._over_blocks(run, weights, rows(embedded), state)

    def _fill(self, tokens, count, conditions):
        def run(block, cache, layer, x, tensors):
            projected = block.query_key_value(x)
            _, key, value = block.split(projected)
            filled = cache.fill(tf.cast(key, self.cache_dtype), tf.cast(value, self.cache_dtype), count)
            tensors = [
                tf.reshape(
                    tf.tensor_scatter_nd_update(tf.reshape(held, [-1, *new.shape]), [[layer]], new[None]), held.shape
                )
                for held, new in zip(tensors, filled, strict=True)
            ]
            x = block.add_attention(x, block.attend(projected)[0])
            return block.add_feed_forward(x, block.hidden(x)), tensors

        weights = self.model.stack.stacked_weights()
        return self._over_blocks(run, weights, self.model.embedding(tokens, conditions), self.zeros())[1]

    def _draw(
        self, state, token, ended, position, count, seed, temperature, top_k, top_p, stop, filters, most, conditions
    ):
        weights = self.model.stack.stacked_weights()  # once, not for every token

        def going_on(drawn, token, ended, *_):
            return (drawn < count) & ~tf.reduce_all(ended)

        def one(drawn, token, ended, tokens, state):
            at = position + drawn
            logits, state = self._step(weights, state, token, at, conditions)
            of_position = tf.stack([seed, tf.cast(at, tf.int64)])
            new = draw(logits, temperature, of_position, *((top_k, top_p) if filters else ()))
            new = tf.where(ended, token, new)
            ended |= tf.reduce_any(new[:, None] == stop, 1)
            return drawn + 1, new, ended, tf.tensor_scatter_nd_update(tokens, [[drawn]], new[None]), state

        tokens = tf.zeros([most, self.batch_size], tf.int32)
        drawn, _, ended, tokens, state = tf.while_loop(going_on, one, (0, token, ended, tokens, state))
        return tf.transpose(tokens), drawn, ended, state


def serves(pattern, length):
    """Whether a pattern takes sequences of a length."""
    try:
        pattern.check_positions(length)
    except ValueError:
        return False
    return True
