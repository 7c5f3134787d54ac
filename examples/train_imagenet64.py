"""Trains a Sparse Transformer on ImageNet 64 x 64, or on a folder of images of any size.

    python examples/train_imagenet64.py --folder=FOLDER     # small model, minutes on two CPU cores
    python examples/train_imagenet64.py --data_dir=PATH     # tensorflow-datasets' folder; fetched if need be
    python examples/train_imagenet64.py ... --resume        # go on after Ctrl-C or a crash
    python examples/train_imagenet64.py --preset=imagenet64 --policy=mixed_bfloat16 --batch_size=128 \
        --steps=700000 --learning_rate=0.00015 --warmup_steps=5000    # the paper's model
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from absl import flags, logging
from PIL import Image

import stf

flags.DEFINE_string("preset", "imagenet64-small", "Configuration of the model: see stf.models.PRESETS.")
flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
flags.DEFINE_string("folder", None, "Folder of images to train on instead.")
flags.DEFINE_string("run_dir", "runs/imagenet64", "Folder of the checkpoint, the log and the samples.")
flags.DEFINE_bool("resume", False, "Go on from the checkpoint in run_dir.")
flags.DEFINE_bool("overwrite", False, "Begin anew where run_dir has a checkpoint.")
flags.DEFINE_float("checkpoint_minutes", 10, "A checkpoint is also written when so many minutes have passed.")
flags.DEFINE_integer("batch_size", 1, "Sequences of a step.")
flags.DEFINE_integer("steps", 400, "Steps of the whole run.")
flags.DEFINE_integer("epochs", 4, "Parts of the run; each ends with validation and a checkpoint.")
flags.DEFINE_float("learning_rate", 6e-3, "Peak of the learning rate.")
flags.DEFINE_integer("warmup_steps", 50, "Steps until the peak.")
flags.DEFINE_float("average", None, "Momentum of a moving average of the weights to evaluate with, such as 0.999.")
flags.DEFINE_string("policy", "float32", "Keras dtype policy: float32, mixed_bfloat16 or mixed_float16.")
flags.DEFINE_bool("jit_compile", None, "Compile the step with XLA; unless set, where there is a GPU.")
flags.DEFINE_integer("held_out_images", 16, "Images of each validation, and of the final one; 0 takes all.")
flags.DEFINE_integer("samples", 1, "Images that are drawn at the end; may be 0.")
flags.DEFINE_integer("num_blocks", None, "Instead of the preset's.")
flags.DEFINE_integer("seed", 0, "Of initial weights, order of images, dropout and samples.")
FLAGS = flags.FLAGS


def make_schedule():
    """The learning rate of the run."""
    return stf.training.WarmupCosine(FLAGS.learning_rate, FLAGS.steps, min(FLAGS.warmup_steps, FLAGS.steps))


def make_model():
    """The model to train."""
    overrides = {} if FLAGS.num_blocks is None else {"num_blocks": FLAGS.num_blocks}
    model = stf.models.SparseTransformer.from_preset(FLAGS.preset, seed=FLAGS.seed, **overrides)
    model.compile(
        optimizer=stf.training.optimizer(make_schedule(), average=FLAGS.average),
        loss=stf.training.cross_entropy(),
        metrics=[stf.training.BitsPerDim()],
        jit_compile="auto" if FLAGS.jit_compile is None else FLAGS.jit_compile,
    )
    return model


def datasets():
    """Training data, as a function of the batches to leave out, and the official validation, or a folder's."""
    batch_size, limit = FLAGS.batch_size, FLAGS.held_out_images
    if FLAGS.folder:
        data = stf.data.images.load(FLAGS.folder)
        print(data.description)
        held_out = stf.data.batches(data.validation[: limit or None], batch_size)
        return lambda done: stf.data.batches(data.train, batch_size, FLAGS.seed, done), held_out
    part = f"validation[:{limit}]" if limit else "validation"

    def train(done):
        return stf.data.imagenet64.dataset("train", batch_size, FLAGS.data_dir, FLAGS.seed, done)

    return train, stf.data.imagenet64.dataset(part, batch_size, FLAGS.data_dir)


def main(_):
    logging.set_verbosity(logging.WARNING)
    keras.utils.set_random_seed(FLAGS.seed)
    keras.config.set_dtype_policy(FLAGS.policy)
    run_dir = pathlib.Path(FLAGS.run_dir)
    train, held_out = datasets()
    samples = stf.callbacks.Samples(run_dir / "log", (64, 64, 3), FLAGS.samples, seed=FLAGS.seed)
    model = stf.experiments.run(
        make_model,
        train,
        held_out,
        run_dir,
        FLAGS.steps,
        min(FLAGS.epochs, FLAGS.steps),
        FLAGS.resume,
        [samples],
        FLAGS.overwrite,
        stf.experiments.settings(FLAGS, FLAGS.folder or "ImageNet 64x64"),
        make_schedule(),
        FLAGS.checkpoint_minutes,
    )

    found = stf.evaluation.evaluate(model, held_out)
    if FLAGS.samples:
        samples.set_model(model)
        drawn = samples.images(verbose=1)
        samples.write("samples", drawn)
        Image.fromarray(stf.callbacks.drawing.grid(drawn)).save(run_dir / "samples.png")
        print(f"samples: {run_dir / 'samples.png'}")
    print(f"validation bits per dim: {found.bits:.3f} ({found.tokens:,} bytes)")
    print(f"checkpoint: {run_dir / 'checkpoint.keras'}")
    print(f"TensorBoard: tensorboard --logdir={run_dir / 'log'}")


if __name__ == "__main__":
    stf.experiments.start(main)
