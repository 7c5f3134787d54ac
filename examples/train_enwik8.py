"""Trains a Sparse Transformer on Enwik8, or on any other text or file, byte by byte.

    python examples/train_enwik8.py                         # fetches Enwik8; small model, minutes on two CPU cores
    python examples/train_enwik8.py --path=FILE_OR_FOLDER   # the unpacked Enwik8, its first bytes, or anything else
    python examples/train_enwik8.py --resume                # go on after Ctrl-C or a crash
    python examples/train_enwik8.py --preset=enwik8 --policy=mixed_bfloat16 --batch_size=4 --steps=585000 \
        --learning_rate=0.00035 --warmup_steps=5000    # the paper's model
"""

import lzma
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from absl import flags, logging

import stf

flags.DEFINE_string("preset", "enwik8-small", "Configuration of the model: see stf.models.PRESETS.")
flags.DEFINE_string("path", None, "Enwik8, unpacked, or any file or folder; Enwik8 is fetched unless given.")
flags.DEFINE_string("run_dir", "runs/enwik8", "Folder of the checkpoint, the log and the sample.")
flags.DEFINE_bool("resume", False, "Go on from the checkpoint in run_dir.")
flags.DEFINE_bool("overwrite", False, "Begin anew where run_dir has a checkpoint.")
flags.DEFINE_float("checkpoint_minutes", 10, "A checkpoint is also written when so many minutes have passed.")
flags.DEFINE_integer("batch_size", 8, "Sequences of a step.")
flags.DEFINE_integer("steps", 1000, "Steps of the whole run.")
flags.DEFINE_integer("epochs", 4, "Parts of the run; each ends with validation and a checkpoint.")
flags.DEFINE_float("learning_rate", 6e-3, "Peak of the learning rate.")
flags.DEFINE_integer("warmup_steps", 50, "Steps until the peak.")
flags.DEFINE_float("average", None, "Momentum of a moving average of the weights to evaluate with, such as 0.999.")
flags.DEFINE_string("policy", "float32", "Keras dtype policy: float32, mixed_bfloat16 or mixed_float16.")
flags.DEFINE_bool("jit_compile", None, "Compile the step with XLA; unless set, where there is a GPU.")
flags.DEFINE_integer("held_out_bytes", 50_000, "Bytes of each validation, and of the final test; 0 takes all.")
flags.DEFINE_integer("sample", 300, "Bytes of the sample at the end.")
flags.DEFINE_integer("num_blocks", None, "Instead of the preset's.")
flags.DEFINE_integer("seed", 0, "Of initial weights, crops, dropout and the sample.")
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
        weighted_metrics=[stf.training.BitsPerDim("bits_per_byte")],
        jit_compile="auto" if FLAGS.jit_compile is None else FLAGS.jit_compile,
    )
    return model


def main(_):
    logging.set_verbosity(logging.WARNING)
    keras.utils.set_random_seed(FLAGS.seed)
    keras.config.set_dtype_policy(FLAGS.policy)
    data = stf.data.files.load_enwik8(FLAGS.path)
    print(data.description)
    length = stf.models.preset(FLAGS.preset)["length"]
    validation, test = (stream.head(FLAGS.held_out_bytes) for stream in (data.validation, data.test))
    model = stf.experiments.run(
        make_model,
        lambda done: stf.data.crops(data.train, length, FLAGS.batch_size, FLAGS.seed, skip=done),
        stf.data.windows(validation, length, FLAGS.batch_size),
        FLAGS.run_dir,
        FLAGS.steps,
        min(FLAGS.epochs, FLAGS.steps),
        FLAGS.resume,
        overwrite=FLAGS.overwrite,
        settings=stf.experiments.settings(FLAGS, data.description),
        schedule=make_schedule(),
        checkpoint_minutes=FLAGS.checkpoint_minutes,
    )

    found = stf.evaluation.evaluate(model, stf.data.windows(test, length, FLAGS.batch_size, context=length // 2))
    prefix = test.tokens[None, : min(200, length // 2)]
    drawn = model.generate(prefix=prefix, length=min(length, prefix.shape[1] + FLAGS.sample), seed=FLAGS.seed)
    sample = pathlib.Path(FLAGS.run_dir) / "sample.txt"
    sample.write_bytes(drawn[0].astype("uint8").tobytes())
    packed = 8 * len(lzma.compress(test.tokens.tobytes(), preset=9)) / found.tokens
    print(f"sample: {sample}")
    print(
        f"test bits per byte: {found.bits:.3f} (the same {found.tokens:,} bytes: "
        f"order-0 entropy {stf.data.order0_entropy(test):.3f}, xz -9 {packed:.3f})"
    )
    print(f"checkpoint: {pathlib.Path(FLAGS.run_dir) / 'checkpoint.keras'}")
    print(f"TensorBoard: tensorboard --logdir={pathlib.Path(FLAGS.run_dir) / 'log'}")


if __name__ == "__main__":
    stf.experiments.start(main)
