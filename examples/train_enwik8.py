"""Trains a Sparse Transformer on Enwik8, or on any other text or file, byte by byte.

    python examples/train_enwik8.py                         # fetches Enwik8; small model, minutes on two CPU cores
    python examples/train_enwik8.py --path=FILE_OR_FOLDER   # the unpacked Enwik8, its first bytes, or anything else
    python examples/train_enwik8.py --resume                # go on after Ctrl-C or a crash
    python examples/train_enwik8.py --preset=enwik8         # the paper's model and run, on all GPUs there are

All flags: --help.
"""

import lzma
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging

import stf

stf.experiments.flags.define("enwik8-small", "runs/enwik8")
flags.DEFINE_string("path", None, "Enwik8, unpacked, or any file or folder; Enwik8 is fetched unless given.")
flags.DEFINE_integer("held_out_bytes", 50_000, "Bytes of each validation, and of the final test; 0 takes all.")
flags.DEFINE_integer("sample", 300, "Bytes of the sample at the end.")
FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    strategy = stf.experiments.make_strategy(devices_per_sequence=FLAGS.devices_per_sequence)
    options = stf.experiments.flags.prepare()
    run_dir = pathlib.Path(options.run_dir)
    with stf.experiments.blamed_on("--path"):
        data = stf.data.files.load_enwik8(FLAGS.path)
    print(data.description)
    config = stf.models.preset(options.preset)
    length, log_dir = config["length"], run_dir / "log"
    validation, test = (stream.head(FLAGS.held_out_bytes) for stream in (data.validation, data.test))
    view = stf.callbacks.views.TextView(config["position_shape"])
    with stf.experiments.blamed_on("--held_out_bytes"):
        maps = stf.experiments.flags.maps_of_stream(log_dir, validation, length, view)
    model = stf.experiments.run(
        lambda: stf.experiments.flags.make_model("bits_per_byte"),
        lambda done, shard: stf.data.crops(data.train, length, options.batch_size, options.seed, done, shard),
        lambda shard: stf.data.windows(validation, length, options.batch_size, shard=shard),
        callbacks=[maps],
        **stf.experiments.flags.run_arguments(data.description, strategy),
    )
    if not stf.experiments.is_first(strategy):
        return

    found = stf.evaluation.evaluate(model, stf.data.windows(test, length, options.batch_size, context=length // 2))
    prefix = max(test.pieces, key=len)[: min(200, length // 2)][None]
    drawn = model.generate(prefix=prefix, length=min(length, prefix.shape[1] + FLAGS.sample), seed=options.seed)
    sample = run_dir / "sample.txt"
    sample.write_bytes(drawn[0].astype("uint8").tobytes())
    stf.callbacks.log_text(log_dir, "sample", drawn[0], stf.training.steps_taken(model.optimizer))
    packed = 8 * len(lzma.compress(test.tokens.tobytes(), preset=9)) / found.tokens
    print(f"sample: {sample}")
    print(
        f"test bits per byte: {found.bits:.3f} (the same {found.tokens:,} bytes: "
        f"order-0 entropy {stf.data.order0_entropy(test):.3f}, xz -9 {packed:.3f})"
    )
    print(f"checkpoint: {run_dir / 'checkpoint.keras'}")
    print(f"TensorBoard: tensorboard --logdir={log_dir}")


if __name__ == "__main__":
    stf.experiments.start(main)
