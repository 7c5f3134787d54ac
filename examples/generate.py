"""Draws samples from a trained model, or completes what it is given.

    python examples/generate.py --checkpoint=runs/cifar10/checkpoint.keras --output=samples.png
    python examples/generate.py --checkpoint=runs/enwik8/checkpoint.keras --prefix=FILE --output=completed.txt
    python examples/generate.py --checkpoint=runs/audio/checkpoint.keras --count=2 --output=music.wav

The output's suffix says what the bytes are: .png is a grid of images, .wav recordings (one file for each sample),
anything else the bytes themselves, one sample after another.

Ctrl-C or a SIGTERM keeps what was drawn in OUTPUT.partial.npz, and so does every minute; the same command with --resume
goes on from there.
"""

import os
import pathlib
import sys
import time

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
flags.DEFINE_multi_integer("condition", None, "What a model that is told conditions is told, one flag for each.")
flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens whose probabilities add up to p.")
flags.DEFINE_integer("seed", 0, "Of the draws.")
flags.DEFINE_bool("resume", False, "Go on with what an interrupted run has drawn.")
flags.DEFINE_bool("overwrite", False, "Write over files that are there.")
FLAGS = flags.FLAGS


def read(path, kind, shape):
    """A file as tokens, of the kind that is to be written."""
    if kind == ".png":
        return stf.data.images.read(path, shape)
    if kind == ".wav":
        return stf.data.audio.encode(stf.data.audio.read(path))
    return np.fromfile(path, np.uint8)


def paths_of(output):
    """The files that will be written."""
    if output.suffix != ".wav":
        return [output]
    return [output.with_stem(f"{output.stem}_{index}") for index in range(FLAGS.count)]


def write(tokens, output, shape):
    """Writes samples `[count, position]`."""
    if output.suffix == ".png":
        Image.fromarray(stf.callbacks.drawing.grid(tokens.reshape(-1, *shape))).save(output)
    elif output.suffix == ".wav":
        for path, sample in zip(paths_of(output), tokens, strict=True):
            stf.data.audio.write(path, sample)
    else:
        output.write_bytes(tokens.tobytes())


def settings():
    """What an interrupted run and the one that goes on must agree in."""
    names = (
        "checkpoint",
        "count",
        "condition",
        "prefix",
        "prefix_length",
        "length",
        "temperature",
        "top_k",
        "top_p",
        "seed",
    )
    return {name: str(FLAGS[name].value) for name in names}


def keep(tokens, partial):
    """Keeps what was drawn, whole whenever the process ends."""
    fresh = partial.with_suffix(".new.npz")
    np.savez(fresh, tokens=tokens, **settings())
    fresh.replace(partial)


def drawn_before(partial):
    """The tokens that an interrupted run has kept."""
    if not partial.exists():
        raise app.UsageError(f"--resume goes on with {partial}, which is not there")
    with np.load(partial) as kept:
        for name, value in settings().items():
            if str(kept[name]) != value:
                raise app.UsageError(
                    f"--{name} must be {kept[name]}, as {partial} was drawn. Received: --{name}={value}"
                )
        return kept["tokens"]


def draw(sampler, partial):
    """Draws all that is left, with a progress bar; keeps it every minute, and when told to stop."""
    bar, kept = keras.utils.Progbar(sampler.length, unit_name="token"), time.monotonic()
    with stf.callbacks.StopOnSignal() as stop:
        while not (sampler.done or stop.received):
            sampler.draw(64)
            bar.update(sampler.tokens.shape[1])
            if time.monotonic() > kept + 60:
                keep(sampler.tokens, partial)
                kept = time.monotonic()
        if not sampler.done:
            keep(sampler.tokens, partial)
            drawn = sampler.tokens.shape[1]
            sys.exit(f"\n{drawn} of {sampler.length} tokens are drawn and kept in {partial}: go on with --resume")


def main(_):
    output = pathlib.Path(FLAGS.output)
    partial = output.with_name(output.name + ".partial.npz")
    for path in paths_of(output):
        if path.exists() and not FLAGS.overwrite:
            raise app.UsageError(f"{path} is there: --overwrite writes over it")
    if partial.exists() and not (FLAGS.resume or FLAGS.overwrite):
        raise app.UsageError(f"{partial} holds an interrupted run: --resume goes on with it, --overwrite begins anew")
    model = keras.saving.load_model(FLAGS.checkpoint)
    stf.training.use_average(model)
    if output.suffix == ".png" and (len(model.position_shape) != 3 or FLAGS.length):
        raise app.UsageError(f"a .png needs a model of images, and whole ones. Received: --output={output}")
    length = FLAGS.length or model.length
    prefix = None
    if FLAGS.resume:
        prefix = drawn_before(partial)
    elif FLAGS.prefix:
        tokens = read(FLAGS.prefix, output.suffix, model.position_shape)[: FLAGS.prefix_length or length // 2]
        prefix = np.tile(tokens, (FLAGS.count, 1))
    sampler = stf.generation.Sampler(
        model,
        FLAGS.count,
        FLAGS.temperature,
        prefix=prefix,
        length=length,
        seed=FLAGS.seed,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
        conditions=FLAGS.condition,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(sampler, partial)
    write(sampler.tokens.astype(np.uint8), output, model.position_shape)
    partial.unlink(missing_ok=True)
    for path in paths_of(output):
        print(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
