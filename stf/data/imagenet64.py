"""ImageNet 64 x 64 as sequences of 12,288 bytes, read from disk as they are needed."""

import numpy as np
import tensorflow as tf

from stf.extras import needed
from stf.typing import PathLike

SHAPE = (64, 64, 3)
NAME = "downsampled_imagenet/64x64"


def dataset(
    split: str,
    batch_size: int,
    data_dir: PathLike | None = None,
    seed: int | None = None,
    skip: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """A `tf.data.Dataset` of (tokens, tokens), int32 `[batch, 12288]`, through tensorflow-datasets.

    Args:
        split: "train" or "validation" (the official one), or a slice of either.
        batch_size: images of a batch, over all workers.
        data_dir: folder of tensorflow-datasets, which fetches the data set where it is not there.
        seed: shuffles files and then a window of 10,000 images, by this seed, and repeats for ever; None keeps
            the order, once, and drops nothing.
        skip: batches to leave out at the start: what a resumed run has seen already. They are read over, not decoded.
        shard: (index, count): which rows of each batch are this worker's; others are not decoded.
    """
    tfds = needed("tensorflow_datasets")

    index, count = shard
    builder = tfds.builder(NAME, data_dir=data_dir)
    builder.download_and_prepare()
    config = tfds.ReadConfig(shuffle_seed=seed, interleave_cycle_length=16 if seed is not None else 1)
    decoders = {"image": tfds.decode.SkipDecoding()}
    data = builder.as_dataset(split=split, shuffle_files=seed is not None, read_config=config, decoders=decoders)
    data = data.map(lambda example: example["image"])
    if seed is not None:
        data = data.shuffle(10_000, seed=seed).repeat()
    data = data.batch(batch_size, drop_remainder=seed is not None).skip(skip)

    def decode(encoded):
        return tf.reshape(tf.io.decode_image(encoded, channels=SHAPE[2], expand_animations=False), [np.prod(SHAPE)])

    def tokens(encoded):
        images = tf.map_fn(decode, encoded[index::count], fn_output_signature=tf.TensorSpec([np.prod(SHAPE)], tf.uint8))
        x = tf.cast(images, tf.int32)
        return x, x

    return data.map(tokens, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
