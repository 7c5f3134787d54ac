"""A model step by step: each call takes one token and gives the next one's logits."""

import numpy as np
import tensorflow as tf

from stf.layers.validation import positive


class Decoder:
    """Runs a `SparseTransformer` one position at a time, keeping each block's keys and values.

    A step reads of the cache only the keys that the pattern gives the position: for strided attention
    about l + n/l of n. Its logits equal those of the whole sequence up to rounding. Queries, keys, values and
    softmax are in float32 under every policy (Section 5.5).

    Args:
        model: a built `SparseTransformer`.
        batch_size: sequences side by side.
        length: positions to make room for.
    """

    def __init__(self, model, batch_size, length):
        length = positive("length", length)
        if length > model.length:
            raise ValueError(f"length must be from 1 to the model's {model.length}. Received: length={length}")
        self.model = model
        self.length = length
        self._blocks = [model.stack.block(index) for index in range(model.num_blocks)]
        self._caches = []
        for _ in self._blocks:
            shapes = [(model.num_heads, length, batch_size, d) for d in (model.key_dim, model.value_dim)]
            self._caches.append([tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes])
        distinct = {}
        # For each block, which of the distinct patterns it has.
        self._which = [distinct.setdefault(block.pattern, len(distinct)) for block in self._blocks]
        self._patterns = list(distinct)
        heads = range(model.num_heads)
        self._most = [max(1, *(int(p.counts(length, h).max()) for h in heads)) for p in self._patterns]
        self._step = tf.function(self._run, reduce_retracing=True)

    def keys(self, position):
        """For each distinct pattern, int32 `[head, most keys]`: what `position` attends to, then -1."""
        tables = []
        for pattern, most in zip(self._patterns, self._most, strict=True):
            table = np.full((self.model.num_heads, most), -1, np.int32)
            for head in range(self.model.num_heads):
                keys = pattern.keys(position, head)
                table[head, : len(keys)] = keys
            tables.append(table)
        return tables

    def _run(self, token, position, tables):
        model = self.model
        x = model.embedding.step(token, position)
        for block, cache, which in zip(self._blocks, self._caches, self._which, strict=True):
            x += self._attend(block, x, cache, position, tables[which])
            x += block.feed_forward_output(block.hidden(x))
        return model.logits(tf.cast(model.final_norm(x), model.logits.compute_dtype))[:, 0]

    @staticmethod
    def _attend(block, x, cache, position, keys):
        """Attention of the query at `position`, whose key and value the cache takes first."""
        projected = block.split(block.query_key_value(x))
        query, key, value = (tf.cast(part[:, 0], tf.float32) for part in projected)
        key_cache, value_cache = cache  # [head, position, batch, depth]
        key_cache[:, position].assign(tf.transpose(key, [1, 0, 2]))
        value_cache[:, position].assign(tf.transpose(value, [1, 0, 2]))
        index = tf.maximum(keys, 0)
        key = tf.gather(tf.convert_to_tensor(key_cache), index, axis=1, batch_dims=1)
        value = tf.gather(tf.convert_to_tensor(value_cache), index, axis=1, batch_dims=1)
        scores = tf.einsum("bhd,hkbd->bhk", query, key) / block.key_dim**0.5
        valid = (keys >= 0)[None]
        weights = tf.where(valid, tf.nn.softmax(tf.where(valid, scores, -1e30)), 0)
        heads = tf.einsum("bhk,hkbd->bhd", weights, value)
        return block.combine(tf.cast(heads[:, None], x.dtype))

    def step(self, token, position):
        """Logits `[batch, vocab_size]` of the token at `position`.

        Args:
            token: int32 `[batch]`, the token before it; at position 0 it does not matter.
            position: from 0, each in turn.
        """
        if not 0 <= position < self.length:
            raise ValueError(f"position must be from 0 to {self.length - 1}. Received: position={position}")
        tables = [tf.constant(table) for table in self.keys(position)]
        return self._step(tf.convert_to_tensor(token, tf.int32), tf.constant(position, tf.int32), tables)
