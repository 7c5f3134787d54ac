"""What chosen positions attend to, block by block, as in the paper's Figure 2: of any finished checkpoint.

    python examples/attention_maps.py --checkpoint=runs/cifar10/checkpoint.keras --image=IMAGE.png --output=maps.png
    python examples/attention_maps.py --checkpoint=runs/enwik8/checkpoint.keras --text=FILE --layer=0 --output=maps.png
    python examples/attention_maps.py --checkpoint=runs/audio/checkpoint.keras --audio=RECORDING --output=maps.png

All flags: --help.
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
flags.DEFINE_string("image", None, "An image, of any size: its middle is taken.")
flags.DEFINE_string("text", None, "A text, or any file: its first bytes are taken.")
flags.DEFINE_string("audio", None, "A recording, of which the beginning is taken.")
flags.mark_flags_as_mutual_exclusive(["image", "text", "audio"], required=True)
flags.DEFINE_string("output", None, "The picture to write.", required=True)
flags.DEFINE_multi_integer("query", None, "Positions that look; a few unless given.")
flags.DEFINE_multi_integer("layer", None, "Layers that are shown; a few unless given.")
flags.DEFINE_multi_integer("head", None, "Heads that are shown; all unless given.")
FLAGS = flags.FLAGS


def read(kind, path, model):
    """One sequence, as long as the model takes, of a file."""
    if kind == "image":
        return stf.data.images.read(path, model.position_shape)
    if kind == "text":
        return np.fromfile(path, np.uint8, model.length)
    return stf.data.audio.encode(stf.data.audio.read(path))[: model.length]


def main(_):
    model = keras.saving.load_model(FLAGS.checkpoint)
    stf.training.use_average(model)
    kind = next(name for name in ("image", "text", "audio") if FLAGS[name].value is not None)
    if len(model.position_shape) != (3 if kind == "image" else 2):
        raise app.UsageError(
            f"--{kind} needs a model of {kind}. Received: --checkpoint of one of {model.position_shape} positions"
        )
    with stf.experiments.blamed_on(f"--{kind}"):
        tokens = read(kind, FLAGS[kind].value, model)
        maps = stf.callbacks.AttentionMaps(
            "unused",
            tokens,
            queries=FLAGS.query,
            view=stf.callbacks.views.view_of(model.position_shape, kind),
            layers=FLAGS.layer,
            heads=FLAGS.head,
        )
    with stf.experiments.blamed_on("--layer, --head"):
        maps.set_model(model)
    output = pathlib.Path(FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(maps.figure()).save(output)
    print(f"written: {output}")


if __name__ == "__main__":
    stf.experiments.start(main)
