"""Trains a Sparse Transformer on recordings: mono, 12 kHz, 8-bit µ-law.

    python examples/train_audio.py --path=FOLDER            # small model, minutes on two CPU cores
    python examples/train_audio.py --path=FOLDER --resume   # go on after Ctrl-C or a crash
    python examples/train_audio.py --path=FOLDER --preset=audio-65k    # the paper's model of 152M parameters

All flags: --help.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging

import stf

stf.experiments.flags.define("audio-small", "runs/audio")
flags.DEFINE_string("path", None, "Folder of recordings: WAV, FLAC, Ogg or AIFF.", required=True)
flags.DEFINE_string("cache", None, "Folder for the recordings' bytes, for more of them than memory holds.")
flags.DEFINE_integer(
    "held_out_bytes", 50_000, "Samples of sound of each validation, and of the final test; 0 takes all."
)
flags.DEFINE_integer("sample", 4096, "Samples of sound that are drawn at the end.")
FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    strategy = stf.experiments.make_strategy(devices_per_sequence=FLAGS.devices_per_sequence)
    options = stf.experiments.flags.prepare()
    run_dir = pathlib.Path(options.run_dir)
    with stf.experiments.blamed_on("--path"):
        data = stf.data.audio.load(FLAGS.path, cache=FLAGS.cache)
    print(data.description)
    config = stf.models.preset(options.preset)
    length, log_dir = config["length"], run_dir / "log"
    validation, test = (stream.head(FLAGS.held_out_bytes) for stream in (data.validation, data.test))
    view = stf.callbacks.views.WaveView(config["position_shape"])
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
    drawn = model.generate(length=min(length, FLAGS.sample), seed=options.seed)
    sample = run_dir / "sample.wav"
    stf.data.audio.write(sample, drawn[0])
    stf.callbacks.log_audio(log_dir, "sample", drawn[0], stf.training.steps_taken(model.optimizer))
    print(f"sample: {sample}")
    print(
        f"test bits per byte: {found.bits:.3f} "
        f"(order-0 entropy of the same {found.tokens:,} bytes: {stf.data.order0_entropy(test):.3f})"
    )
    print(f"checkpoint: {run_dir / 'checkpoint.keras'}")
    print(f"TensorBoard: tensorboard --logdir={log_dir}")


if __name__ == "__main__":
    stf.experiments.start(main)
