"""A model step by step: each call takes one token and gives the next one's logits."""

import numpy as np
import tensorflow as tf


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
        if not 1 <= length <= model.length:
            raise ValueError(f"length must be from 1 to the model's {model.length}. Received: length={length}")
        self.model = model
        self.length = length
        self._caches = []
        for _ in model.blocks:
            shapes = [(model.num_heads, length, batch_size, d) for d in (model.key_dim, model.value_dim)]
            self._caches.append([tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes])
        distinct = {}
        self._which = []  # for each block, which of the distinct patterns it has
        for block in model.blocks:
            self._which.append(distinct.setdefault(block.attention.pattern, len(distinct)))
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
        for block, cache, which in zip(model.blocks, self._caches, self._which, strict=True):
            x += self._attend(block.attention, block.attention_norm(x), cache, position, tables[which])
            x += block.feed_forward(block.feed_forward_norm(x))
        return tf.cast(model.logits(model.final_norm(x)), tf.float32)[:, 0]

    @staticmethod
    def _attend(attention, x, cache, position, keys):
        """Attention of the query at `position`, whose key and value the cache takes first."""
        query, key, value = (tf.cast(projected[:, 0], tf.float32) for projected in attention.project(x))
        key_cache, value_cache = cache  # [head, position, batch, depth]
        key_cache[:, position].assign(tf.transpose(key, [1, 0, 2]))
        value_cache[:, position].assign(tf.transpose(value, [1, 0, 2]))
        index = tf.maximum(keys, 0)
        key = tf.gather(tf.convert_to_tensor(key_cache), index, axis=1, batch_dims=1)
        value = tf.gather(tf.convert_to_tensor(value_cache), index, axis=1, batch_dims=1)
        scores = tf.einsum("bhd,hkbd->bhk", query, key) / attention.key_dim**0.5
        valid = (keys >= 0)[None]
        weights = tf.where(valid, tf.nn.softmax(tf.where(valid, scores, -1e30)), 0)
        heads = tf.einsum("bhk,hkbd->bhd", weights, value)
        return attention.combine(tf.cast(heads[:, None], attention.compute_dtype))

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
