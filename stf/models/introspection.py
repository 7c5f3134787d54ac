"""What a model has learned to look at, and what it knows of a sequence."""

import itertools
import numbers

import keras
import numpy as np
import tensorflow as tf

from stf.layers.attention import weights_of_queries
from stf.layers.validation import positive


def attention_weights(model, tokens, positions, blocks=None, conditions=None):
    """What chosen queries of a `SparseTransformer` attend to: see its method of the same name."""
    blocks = list(range(model.num_blocks)) if blocks is None else list(blocks)
    found = {}
    embedded = model.embedding(tf.convert_to_tensor(tokens), conditions)
    for index, stream in enumerate(model.stack.hidden(embedded)):
        if index in blocks:
            block = model.stack.block(index)
            query, key, _ = block.split(block.query_key_value(stream))
            found[index] = weights_of_queries(query, key, model.stack.pattern(index), positions)
        if len(found) == len(set(blocks)):
            break
    return [found[index] for index in blocks]


def features(model, tokens, block=None, batch_size=16, verbose=0):
    """The mean over positions of a block's normalized output: see `SparseTransformer.features`."""
    block = (model.num_blocks - 1) // 2 if block is None else block
    if isinstance(block, bool) or not isinstance(block, numbers.Integral) or not 0 <= block < model.num_blocks:
        raise ValueError(f"block must be an int from 0 to {model.num_blocks - 1}. Received: block={block!r}")
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers [sequence, position]. "
            f"Received: tokens of shape {tokens.shape} and dtype {tokens.dtype}"
        )

    @tf.function(reduce_retracing=True)
    def of_batch(tokens):
        streams = model.stack.hidden(model.embedding(tokens))
        x = tf.cast(next(itertools.islice(streams, block + 1, None)), tf.float32)
        mean, variance = tf.nn.moments(x, axes=-1, keepdims=True)
        return tf.reduce_mean((x - mean) * tf.math.rsqrt(variance + model.final_norm.epsilon), axis=1)

    found = [np.zeros((0, model.model_dim), np.float32)]
    batches = range(0, len(tokens), positive("batch_size", batch_size))
    bar = keras.utils.Progbar(len(batches), verbose=int(bool(verbose)), unit_name="batch")
    for begin in batches:
        found.append(of_batch(tf.constant(tokens[begin : begin + batch_size], tf.int32)).numpy())
        bar.add(1)
    return np.concatenate(found)
