"""Bits per byte of a trained model over a whole split: no example and no tail is left out.

    python examples/evaluate.py --checkpoint=runs/cifar10/checkpoint.keras --data=cifar10 --path=PATH
    python examples/evaluate.py --checkpoint=runs/enwik8/checkpoint.keras --data=text --path=FILE --context=6144
    python examples/evaluate.py ... --context=11264 --batch_size=1 --dynamic=3e-5    # the model learns as it reads
    python examples/evaluate.py ... --losses=losses.npy     # nats of every byte, in the data's order

The last line of output is JSON. --context is Table 3's minimum context of a counted byte, for text and audio.
The model computes in float32 whatever it was trained in, unless --keep_policy is given.
"""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from absl import app, flags, logging

import stf

flags.DEFINE_string("checkpoint", None, "A .keras file.", required=True)
flags.DEFINE_enum("data", None, ["cifar10", "imagenet64", "text", "audio", "images"], "Kind of data.", required=True)
flags.DEFINE_string("path", None, "tensorflow-datasets' folder, file, or folder of the data.")
flags.DEFINE_enum("split", "test", ["train", "validation", "test", "all"], "Split of the data; all does not split it.")
flags.DEFINE_integer("batch_size", 4, "Sequences at once; does not change the result.")
flags.DEFINE_integer("context", 0, "Least context of a counted byte, text and audio only.")
flags.DEFINE_integer("limit", 0, "Only so many examples, or bytes, from the start; 0 takes all.")
flags.DEFINE_bool("keep_policy", False, "Compute in the dtype policy that the model was trained in.")
flags.DEFINE_float("dynamic", None, "Dynamic evaluation: the learning rate of stf.evaluation.evaluate_dynamically.")
flags.DEFINE_string("losses", None, "NumPy file for the nats of every byte.")
FLAGS = flags.FLAGS

SCALES = 16  # batches of training data that say how large each weight's gradient is
LOADERS = {
    "cifar10": lambda: stf.data.cifar10.load(FLAGS.path),
    "text": lambda: stf.data.files.load_enwik8(FLAGS.path),
    "audio": lambda: stf.data.audio.load(FLAGS.path),
}


def dataset(model, split, limit):
    """A split, or the first examples or bytes of it, in batches that count every byte once."""
    if FLAGS.data == "imagenet64":
        if split not in ("train", "validation"):
            raise app.UsageError(f"ImageNet 64 x 64 has train and validation. Received: --split={split}")
        part = f"{split}[:{limit}]" if limit else split
        return stf.data.imagenet64.dataset(part, FLAGS.batch_size, FLAGS.path)
    if FLAGS.data == "images":
        data = stf.data.images.load(FLAGS.path, model.position_shape)
    elif FLAGS.data == "text" and split == "all" and FLAGS.path:
        data = stf.data.files.load(FLAGS.path, held_out=(0, 0))  # nothing is cut, not even at the splits' borders
    else:
        data = LOADERS[FLAGS.data]()
    print(data.description)
    part = whole(data) if split == "all" else getattr(data, split)
    if isinstance(part, stf.data.Stream):
        return stf.data.windows(part.head(limit), model.length, FLAGS.batch_size, FLAGS.context)
    if FLAGS.context:
        raise app.UsageError(f"--context is for text and audio. Received: --context={FLAGS.context}")
    return stf.data.batches(part[: limit or None], FLAGS.batch_size)


def whole(data):
    """All three splits as one."""
    if isinstance(data.train, stf.data.Stream):
        return stf.data.Stream([piece for stream in data[:3] for piece in stream.pieces])
    return np.concatenate(data[:3])


def main(_):
    logging.set_verbosity(logging.WARNING)
    if FLAGS.dynamic is not None and FLAGS.split in ("train", "all"):
        raise app.UsageError(f"--dynamic is for a split that is held out. Received: --split={FLAGS.split}")
    if FLAGS.dynamic is not None and FLAGS.keep_policy:
        raise app.UsageError("--dynamic computes in float32. Received: --keep_policy")
    model = keras.saving.load_model(FLAGS.checkpoint)
    stf.training.use_average(model)
    if not FLAGS.keep_policy:
        model = stf.evaluation.in_float32(model)
    held_out = dataset(model, FLAGS.split, FLAGS.limit)
    if FLAGS.dynamic is None:
        found = stf.evaluation.evaluate(model, held_out)
    else:
        scales = stf.evaluation.gradient_scales(model, dataset(model, "train", 0).take(SCALES))
        found = stf.evaluation.evaluate_dynamically(model, held_out, scales, FLAGS.dynamic)
    if FLAGS.losses:
        np.save(FLAGS.losses, found.losses)
    result = {"checkpoint": FLAGS.checkpoint, "data": FLAGS.data, "split": FLAGS.split, "context": FLAGS.context}
    result |= {} if FLAGS.dynamic is None else {"dynamic": FLAGS.dynamic}
    result |= {"bits_per_byte": found.bits, "bytes": found.tokens, "seconds": round(found.seconds, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
