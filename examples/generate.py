"""Draws samples from a trained model, or completes what it is given.

    python examples/generate.py --checkpoint=runs/cifar10/checkpoint.keras --output=samples.png
    python examples/generate.py --checkpoint=runs/enwik8/checkpoint.keras --prefix=FILE --output=completed.txt
    python examples/generate.py --checkpoint=runs/audio/checkpoint.keras --count=2 --output=music.wav

The output's suffix says what the bytes are: .png is a grid of images, .wav recordings (one file for each sample),
anything else the bytes themselves, one sample after another.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from absl import app, flags
from PIL import Image

import stf

flags.DEFINE_string("checkpoint", None, "A .keras file.", required=True)
flags.DEFINE_string("output", None, "File to write: .png, .wav or any other.", required=True)
flags.DEFINE_integer("count", 4, "Samples, drawn side by side.")
flags.DEFINE_string("prefix", None, "File that every sample begins with: an image, a recording or any other file.")
flags.DEFINE_integer("prefix_length", 0, "Tokens of the prefix to keep; 0 keeps half of a sample's at the most.")
flags.DEFINE_integer("length", 0, "Tokens of a sample, the prefix included; 0 takes the model's.")
flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the likeliest token.")
flags.DEFINE_integer("top_k", None, "Draw from the k likeliest tokens only.")
flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens whose probabilities add up to p.")
flags.DEFINE_integer("seed", 0, "Of the draws.")
FLAGS = flags.FLAGS


def read(path, kind, shape):
    """A file as tokens, of the kind that is to be written."""
    if kind == ".png":
        return stf.data.images.read(path, shape)
    if kind == ".wav":
        return stf.data.audio.encode(stf.data.audio.read(path))
    return np.fromfile(path, np.uint8)


def write(tokens, output, shape):
    """Writes samples `[count, position]`; returns the paths."""
    if output.suffix == ".png":
        Image.fromarray(stf.callbacks.drawing.grid(tokens.reshape(-1, *shape))).save(output)
        return [output]
    if output.suffix == ".wav":
        paths = [output.with_stem(f"{output.stem}_{index}") for index in range(len(tokens))]
        for path, sample in zip(paths, tokens, strict=True):
            stf.data.audio.write(path, sample)
        return paths
    output.write_bytes(tokens.tobytes())
    return [output]


def main(_):
    model = keras.saving.load_model(FLAGS.checkpoint)
    stf.training.use_average(model)
    output = pathlib.Path(FLAGS.output)
    if output.suffix == ".png" and (len(model.position_shape) != 3 or FLAGS.length):
        raise app.UsageError(f"a .png needs a model of images, and whole ones. Received: --output={output}")
    length = FLAGS.length or model.length
    prefix = None
    if FLAGS.prefix:
        tokens = read(FLAGS.prefix, output.suffix, model.position_shape)[: FLAGS.prefix_length or length // 2]
        prefix = np.tile(tokens, (FLAGS.count, 1))
    drawn = model.generate(
        FLAGS.count,
        FLAGS.temperature,
        prefix=prefix,
        length=length,
        seed=FLAGS.seed,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in write(drawn.astype(np.uint8), output, model.position_shape):
        print(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
