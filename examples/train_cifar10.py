"""Trains a Sparse Transformer on CIFAR-10 and shows what it has learned.

    python examples/train_cifar10.py                                   # small model, minutes on two CPU cores
    python examples/train_cifar10.py --data_dir=PATH                   # where tensorflow-datasets keeps CIFAR-10
    python examples/train_cifar10.py --resume                          # go on after Ctrl-C or a crash
    python examples/train_cifar10.py --preset=cifar10                  # the paper's model and run, on all GPUs
    tensorboard --logdir=runs/cifar10/log                              # losses, samples, attention maps

All flags: --help.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from absl import flags, logging
from PIL import Image

import stf

stf.experiments.flags.define("cifar10-small", "runs/cifar10")
flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
flags.DEFINE_integer(
    "validation_images", None, "Images of each validation; 0 takes all. Unless given, 64 for a small preset."
)
flags.DEFINE_integer("test_images", None, "Images of the test; 0 takes all. Unless given, 256 for a small preset.")
flags.DEFINE_integer("samples", 8, "Samples, and completions, drawn at the end; 0 draws none.")
FLAGS = flags.FLAGS


def load_data():
    """CIFAR-10, or photographs where it cannot be had and nobody named a folder; and whether it is photographs."""
    try:
        data, instead = stf.data.cifar10.load(FLAGS.data_dir), False
    except stf.data.cifar10.NotAvailableError as error:
        if FLAGS.data_dir is not None:
            raise stf.experiments.RunError(f"--data_dir: {error}") from error
        print(f"{error}\nGoing on with real photographs instead; --data_dir names a folder with CIFAR-10.")
        data, instead = stf.data.photographs.load(), True
    print(data.description)
    return data, instead


def save_pictures(samples, half, run_dir):
    """Samples, and completions of half-hidden test images beside the whole ones, as PNG and in TensorBoard."""
    drawn = samples.images(verbose=1)
    completed = samples.images(prefix=half[:, : half.shape[1] // 2], verbose=1)
    whole = half.reshape(completed.shape)
    hidden = whole.copy()
    hidden[:, whole.shape[1] // 2 :] = 0
    for name, images, columns, caption in (
        ("samples", drawn, None, "samples"),
        ("completions", np.concatenate([hidden, completed, whole]), len(whole), "given, completed, whole"),
    ):
        samples.write(name, images, columns, samples.caption(caption))
        path = run_dir / f"{name}.png"
        Image.fromarray(stf.callbacks.drawing.grid(images, columns)).save(path)
        print(f"{name}: {path}")


def main(_):
    logging.set_verbosity(logging.WARNING)
    strategy = stf.experiments.make_strategy(devices_per_sequence=FLAGS.devices_per_sequence)
    options = stf.experiments.flags.prepare()
    run_dir = pathlib.Path(options.run_dir)
    log_dir = run_dir / "log"
    data, instead = load_data()
    small = options.preset.endswith("-small")
    validation = data.validation[: limit(FLAGS.validation_images, 64 if small else None)]
    test = data.test[: limit(FLAGS.test_images, 256 if small else None)]
    config = stf.models.preset(options.preset)
    transformations = stf.data.ImageTransformations(config["position_shape"]) if config.get("conditions") else None
    samples = stf.callbacks.Samples(log_dir, count=FLAGS.samples, seed=options.seed)
    model = stf.experiments.run(
        stf.experiments.flags.make_model,
        lambda done, shard: stf.data.batches(
            data.train, options.batch_size, options.seed, done, shard, transformations
        ),
        lambda shard: stf.data.batches(validation, options.batch_size, shard=shard),
        callbacks=[
            stf.callbacks.AttentionMaps(log_dir, validation[0], **stf.experiments.flags.map_options()),
            samples,
        ],
        **stf.experiments.flags.run_arguments(data.description, strategy),
    )
    if not stf.experiments.is_first(strategy):
        return

    found = stf.evaluation.evaluate(model, stf.data.batches(test, options.batch_size))
    if FLAGS.samples:
        samples.set_model(model)
        chosen = np.linspace(0, len(data.test) - 1, FLAGS.samples).astype(int)  # neighbours may be alike
        save_pictures(samples, data.test[chosen], run_dir)
    of = ", photographs, NOT CIFAR-10" if instead else ""
    entropy = stf.data.order0_entropy(test)
    print(f"test bits per dim{of}: {found.bits:.3f} (order-0 entropy of the same {len(test):,} images: {entropy:.3f})")
    print(f"checkpoint{of}: {run_dir / 'checkpoint.keras'}")
    print(f"TensorBoard{of}: tensorboard --logdir={log_dir}")


def limit(count, otherwise):
    """How many of a list: None is all, which a flag of 0 says."""
    return (otherwise if count is None else count) or None


if __name__ == "__main__":
    stf.experiments.start(main)
