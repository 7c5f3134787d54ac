"""Trains a Sparse Transformer on CIFAR-10 and shows what it has learned.

    python examples/train_cifar10.py                                   # small model, minutes on two CPU cores
    python examples/train_cifar10.py --data_dir=PATH                   # where tensorflow-datasets keeps CIFAR-10
    python examples/train_cifar10.py --resume                          # go on after Ctrl-C or a crash
    python examples/train_cifar10.py --preset=cifar10 --policy=mixed_bfloat16 --batch_size=16 --steps=360000 \
        --learning_rate=0.00035 --warmup_steps=5000    # the paper's model
    tensorboard --logdir=runs/cifar10/log                              # losses, samples, attention maps
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from absl import flags, logging
from PIL import Image

import stf

flags.DEFINE_string("preset", "cifar10-small", "Configuration of the model: see stf.models.PRESETS.")
flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
flags.DEFINE_string("run_dir", "runs/cifar10", "Folder of the checkpoint, the log and the pictures.")
flags.DEFINE_bool("resume", False, "Go on from the checkpoint in run_dir.")
flags.DEFINE_bool("overwrite", False, "Begin anew where run_dir has a checkpoint.")
flags.DEFINE_float("checkpoint_minutes", 10, "A checkpoint is also written when so many minutes have passed.")
flags.DEFINE_integer("batch_size", 4, "Images of a step.")
flags.DEFINE_integer("steps", 800, "Steps of the whole run.")
flags.DEFINE_integer("epochs", 4, "Parts of the run; each ends with validation and a checkpoint.")
flags.DEFINE_float("learning_rate", 6e-3, "Peak of the learning rate.")
flags.DEFINE_integer("warmup_steps", 50, "Steps until the peak.")
flags.DEFINE_float("average", None, "Momentum of a moving average of the weights to evaluate with, such as 0.999.")
flags.DEFINE_string("policy", "float32", "Keras dtype policy: float32, mixed_bfloat16 or mixed_float16.")
flags.DEFINE_bool("jit_compile", None, "Compile the step with XLA; unless set, where there is a GPU.")
flags.DEFINE_integer("validation_images", 64, "Images of each validation; 0 takes all.")
flags.DEFINE_integer("test_images", 256, "Images of the final test; 0 takes all.")
flags.DEFINE_integer("samples", 8, "Samples, and completions, drawn at the end; 0 draws none.")
flags.DEFINE_integer("num_blocks", None, "Instead of the preset's.")
flags.DEFINE_integer("seed", 0, "Of initial weights, order of images, dropout and samples.")
FLAGS = flags.FLAGS


def load_data():
    """CIFAR-10, or real photographs where there is neither the data set nor a network."""
    try:
        data = stf.data.cifar10.load(FLAGS.data_dir)
    except stf.data.cifar10.NotAvailableError as error:
        print(f"{error}\nGoing on with real photographs instead; --data_dir names a folder with CIFAR-10.")
        data = stf.data.photographs.load()
    print(data.description)
    return data


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


def save_pictures(samples, half, run_dir):
    """Samples, and completions of half-hidden test images beside the whole ones, as PNG and in TensorBoard."""
    drawn = samples.images(verbose=1)
    completed = samples.images(prefix=half[:, : half.shape[1] // 2], verbose=1)
    whole = half.reshape(completed.shape)
    hidden = whole.copy()
    hidden[:, whole.shape[1] // 2 :] = 0
    for name, images, columns in (
        ("samples", drawn, None),
        ("completions", np.concatenate([hidden, completed, whole]), len(whole)),
    ):
        samples.write(name, images, columns)
        path = run_dir / f"{name}.png"
        Image.fromarray(stf.callbacks.drawing.grid(images, columns)).save(path)
        print(f"{name}: {path}")


def main(_):
    logging.set_verbosity(logging.WARNING)
    keras.utils.set_random_seed(FLAGS.seed)
    keras.config.set_dtype_policy(FLAGS.policy)
    run_dir = pathlib.Path(FLAGS.run_dir)
    log_dir = run_dir / "log"
    data = load_data()
    validation = data.validation[: FLAGS.validation_images or None]
    samples = stf.callbacks.Samples(log_dir, count=FLAGS.samples, seed=FLAGS.seed)
    model = stf.experiments.run(
        make_model,
        lambda done: stf.data.batches(data.train, FLAGS.batch_size, seed=FLAGS.seed, skip=done),
        stf.data.batches(validation, FLAGS.batch_size),
        run_dir,
        FLAGS.steps,
        min(FLAGS.epochs, FLAGS.steps),
        FLAGS.resume,
        [stf.callbacks.AttentionMaps(log_dir, validation[0], every=0), samples],
        FLAGS.overwrite,
        stf.experiments.settings(FLAGS, data.description),
        make_schedule(),
        FLAGS.checkpoint_minutes,
    )

    test = data.test[: FLAGS.test_images or None]
    result = model.evaluate(stf.data.batches(test, FLAGS.batch_size), return_dict=True)
    if FLAGS.samples:
        samples.set_model(model)
        save_pictures(samples, data.test[: FLAGS.samples], run_dir)
    bits, entropy = result["bits_per_dim"], stf.data.order0_entropy(test)
    print(f"test bits per dim: {bits:.3f} (order-0 entropy of the same {len(test):,} images: {entropy:.3f})")
    print(f"checkpoint: {run_dir / 'checkpoint.keras'}")
    print(f"TensorBoard: tensorboard --logdir={log_dir}")


if __name__ == "__main__":
    stf.experiments.start(main)
