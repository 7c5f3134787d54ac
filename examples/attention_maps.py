"""What chosen pixels of an image attend to, block by block, as in the paper's Figure 2: of any finished checkpoint.

    python examples/attention_maps.py --checkpoint=runs/cifar10/checkpoint.keras --image=IMAGE.png --output=maps.png

All flags: --help.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from absl import app, flags
from PIL import Image

import stf

flags.DEFINE_string("checkpoint", None, "A .keras file of a model of images.", required=True)
flags.DEFINE_string("image", None, "An image, of any size: its middle is taken.", required=True)
flags.DEFINE_string("output", None, "The picture to write.", required=True)
flags.DEFINE_multi_integer("query", None, "Positions that look; a few across the image unless given.")
FLAGS = flags.FLAGS


def main(_):
    model = keras.saving.load_model(FLAGS.checkpoint)
    stf.training.use_average(model)
    if len(model.position_shape) != 3:
        raise app.UsageError(f"--checkpoint must be of a model of images. Received: {model.position_shape} positions")
    with stf.experiments.blamed_on("--image"):
        tokens = stf.data.images.read(FLAGS.image, model.position_shape)
    options = {"queries": FLAGS.query} if FLAGS.query else {}
    maps = stf.callbacks.AttentionMaps("unused", tokens, model.position_shape, **options)
    maps.set_model(model)
    output = pathlib.Path(FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(maps.figure()).save(output)
    print(f"written: {output}")


if __name__ == "__main__":
    stf.experiments.start(main)
