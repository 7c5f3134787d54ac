"""Trains a Sparse Transformer on ImageNet 64 x 64, or on a folder of images of any size.

    python examples/train_imagenet64.py --folder=FOLDER     # small model, minutes on two CPU cores
    python examples/train_imagenet64.py --data_dir=PATH     # tensorflow-datasets' folder; fetched if need be
    python examples/train_imagenet64.py ... --resume        # go on after Ctrl-C or a crash
    python examples/train_imagenet64.py --preset=imagenet64    # the paper's model and run, on all GPUs there are

All flags: --help.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging
from PIL import Image

import stf

stf.experiments.flags.define("imagenet64-small", "runs/imagenet64")
flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
flags.DEFINE_string("folder", None, "Folder of images to train on instead.")
flags.DEFINE_integer("held_out_images", 16, "Images of each validation, and of the final one; 0 takes all.")
flags.DEFINE_integer("samples", 1, "Images that are drawn at the end; may be 0.")
FLAGS = flags.FLAGS


def datasets(options):
    """Training data, a function of batches to leave out and shard; validation, of shard; what they are, in words."""
    batch_size, limit = options.batch_size, FLAGS.held_out_images
    if FLAGS.folder:
        with stf.experiments.blamed_on("--folder"):
            data = stf.data.images.load(FLAGS.folder)
        print(data.description)
        held_out = data.validation[: limit or None]
        return (
            lambda done, shard: stf.data.batches(data.train, batch_size, options.seed, done, shard),
            lambda shard: stf.data.batches(held_out, batch_size, shard=shard),
            data.description,
        )
    dataset, part = stf.data.imagenet64.dataset, f"validation[:{limit}]" if limit else "validation"
    return (
        lambda done, shard: dataset("train", batch_size, FLAGS.data_dir, options.seed, done, shard),
        lambda shard: dataset(part, batch_size, FLAGS.data_dir, shard=shard),
        "ImageNet 64x64",
    )


def main(_):
    logging.set_verbosity(logging.WARNING)
    strategy = stf.experiments.make_strategy(devices_per_sequence=FLAGS.devices_per_sequence)
    options = stf.experiments.flags.prepare()
    run_dir = pathlib.Path(options.run_dir)
    train, held_out, description = datasets(options)
    samples = stf.callbacks.Samples(run_dir / "log", (64, 64, 3), FLAGS.samples, seed=options.seed)
    tokens = next(iter(held_out((0, 1))))[0][0].numpy()
    maps = stf.callbacks.AttentionMaps(run_dir / "log", tokens, (64, 64, 3), **stf.experiments.flags.map_options())
    model = stf.experiments.run(
        stf.experiments.flags.make_model,
        train,
        held_out,
        callbacks=[maps, samples],
        **stf.experiments.flags.run_arguments(description, strategy),
    )
    if not stf.experiments.is_first(strategy):
        return

    found = stf.evaluation.evaluate(model, held_out((0, 1)))
    if FLAGS.samples:
        samples.set_model(model)
        drawn = samples.images(verbose=1)
        samples.write("samples", drawn, caption=samples.caption())
        Image.fromarray(stf.callbacks.drawing.grid(drawn)).save(run_dir / "samples.png")
        print(f"samples: {run_dir / 'samples.png'}")
    print(f"validation bits per dim: {found.bits:.3f} ({found.tokens:,} bytes)")
    print(f"checkpoint: {run_dir / 'checkpoint.keras'}")
    print(f"TensorBoard: tensorboard --logdir={run_dir / 'log'}")


if __name__ == "__main__":
    stf.experiments.start(main)
