"""The flags that all training programs share."""

import types
from typing import Any

import keras
import tensorflow as tf
from absl import flags

import stf.models
import stf.training
from stf.callbacks import AttentionMaps
from stf.callbacks.views import View
from stf.data.sequences import Stream
from stf.experiments.errors import RunError
from stf.typing import PathLike

FLAGS = flags.FLAGS
SETTINGS = (
    "preset", "num_blocks", "batch_size", "learning_rate", "warmup_steps", "weight_decay", "average", "policy",
    "accumulation_steps", "all_reduce_dtype", "seed",
)  # fmt: skip


def define(preset: str, run_dir: str) -> None:
    """Defines the flags of a run; what a preset's recipe holds is the recipe's unless a flag says otherwise.

    Args:
        preset: the model unless `--preset` names another.
        run_dir: folder unless `--run_dir` names another.
    """
    flags.DEFINE_string("preset", preset, "The model and how it is trained: see stf.models.PRESETS and RECIPES.")
    flags.DEFINE_string("run_dir", run_dir, "Folder of the checkpoint, the log and what is drawn.")
    flags.DEFINE_bool("resume", False, "Go on from the checkpoint in run_dir.")
    flags.DEFINE_bool("overwrite", False, "Begin anew where run_dir has a checkpoint.")
    flags.DEFINE_float("checkpoint_minutes", 10, "A checkpoint is also written when so many minutes have passed.")
    recipe = "; the preset's recipe's unless given."
    flags.DEFINE_integer("batch_size", None, f"Sequences of a step, over all GPUs{recipe}")
    flags.DEFINE_integer("steps", None, f"Steps of the whole run{recipe}")
    flags.DEFINE_integer("epochs", None, f"Parts of the run; each ends with validation and a checkpoint{recipe}")
    flags.DEFINE_float("learning_rate", None, f"Peak of the learning rate{recipe}")
    flags.DEFINE_integer("warmup_steps", None, f"Steps until the peak, at most all{recipe}")
    flags.DEFINE_float("weight_decay", None, f"Times the learning rate, what decayed weights lose a step{recipe}")
    flags.DEFINE_float(
        "average", None, f"Momentum of a moving average of the weights to evaluate with; 0 keeps none{recipe}"
    )
    flags.DEFINE_string("policy", None, f"Keras dtype policy: float32, mixed_bfloat16 or mixed_float16{recipe}")
    flags.DEFINE_integer("accumulation_steps", 1, "Batches whose mean gradient makes one update.")
    flags.DEFINE_enum(
        "all_reduce_dtype", None, ["float32", "bfloat16", "float16"], "What gradients are summed in over several GPUs."
    )
    flags.DEFINE_integer(
        "devices_per_sequence", 1, "GPUs that share the positions of each sequence; batches are shared by the rest."
    )
    flags.DEFINE_bool("jit_compile", None, "Compile the step with XLA; unless set, where there is a GPU.")
    flags.DEFINE_integer("num_blocks", None, "Instead of the preset's.")
    flags.DEFINE_list("map_layers", None, "Layers of TensorBoard's attention maps, 0,1,...; a few unless given.")
    flags.DEFINE_list("map_heads", None, "Heads of TensorBoard's attention maps; all unless given.")
    flags.DEFINE_integer("seed", 0, "Of initial weights, order of the data, dropout and samples.")


def options() -> types.SimpleNamespace:
    """The flags' values, the recipe's where a flag is not given: a namespace.

    Raises:
        RunError: there is no such preset, or a number makes no sense.
    """
    try:
        found = stf.models.recipe(FLAGS.preset)
    except ValueError as error:
        raise RunError(f"--{error}") from error
    found |= {name: FLAGS[name].value for name in SETTINGS if FLAGS[name].value is not None or name not in found}
    found |= {name: FLAGS[name].value for name in ("steps", "epochs") if FLAGS[name].value is not None}
    for name in ("batch_size", "steps", "epochs", "accumulation_steps"):
        if found[name] < 1:
            raise RunError(f"--{name} must be 1 or more. Received: --{name}={found[name]}")
    found["average"] = found["average"] or None
    found["run_dir"] = FLAGS.run_dir
    found["epochs"] = min(found["epochs"], found["steps"])
    return types.SimpleNamespace(**found)


def schedule() -> stf.training.WarmupCosine:
    """The learning rate of the run; its warm-up is at most the whole run."""
    o = options()
    return stf.training.WarmupCosine(o.learning_rate, o.steps, min(o.warmup_steps, o.steps))


def make_model(metric: str = "bits_per_dim") -> stf.models.SparseTransformer:
    """The model to train, compiled; called under the strategy that trains it."""
    o = options()
    overrides = {} if o.num_blocks is None else {"num_blocks": o.num_blocks}
    model = stf.models.SparseTransformer.from_preset(o.preset, seed=o.seed, **overrides)
    model.compile(
        optimizer=stf.training.optimizer(
            schedule(),
            o.weight_decay,
            average=o.average,
            accumulation_steps=o.accumulation_steps,
            all_reduce_dtype=o.all_reduce_dtype,
        ),
        loss=stf.training.cross_entropy(),
        weighted_metrics=[stf.training.BitsPerDim(metric)],
        jit_compile="auto" if FLAGS.jit_compile is None else FLAGS.jit_compile,
    )
    return model


def prepare() -> types.SimpleNamespace:
    """Seeds and dtype policy of a run; returns its `options`."""
    o = options()
    keras.utils.set_random_seed(o.seed)
    keras.config.set_dtype_policy(o.policy)
    return o


def map_options() -> dict[str, Any]:
    """What the flags say to `stf.callbacks.AttentionMaps`: keyword arguments.

    Raises:
        RunError: they are no layers or heads of the model.
    """
    config = stf.models.preset(FLAGS.preset) | ({} if FLAGS.num_blocks is None else {"num_blocks": FLAGS.num_blocks})
    found = {}
    for name, count in (("layers", config["num_blocks"]), ("heads", config["num_heads"])):
        given = FLAGS[f"map_{name}"].value
        if given is not None and not (given and all(each.isdecimal() and int(each) < count for each in given)):
            raise RunError(f"--map_{name} must be from 0 to {count - 1}. Received: --map_{name}={','.join(given)}")
        found[name] = None if given is None else [int(each) for each in given]
    return found


def maps_of_stream(log_dir: PathLike, stream: Stream, length: int, view: View) -> AttentionMaps:
    """The attention maps of a run on text or sound, a `stf.callbacks.AttentionMaps`.

    Args:
        log_dir: TensorBoard's folder.
        stream: a `stf.data.Stream`; the beginning of its longest piece is shown.
        length: of the model's sequences.
        view: of `stf.callbacks.views`.

    Raises:
        ValueError: the stream has fewer than two positions in a piece.
        RunError: flags that do not fit the model.
    """
    tokens = max(stream.pieces, key=len)[:length]
    return AttentionMaps(log_dir, tokens, most_layers=4, view=view, **map_options())


def run_arguments(data: str, strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """What the flags say to `stf.experiments.run`: keyword arguments.

    Args:
        data: what the data are, in words: a run goes on with the same alone.
        strategy: see `stf.experiments.make_strategy`. Its replicas share a batch evenly.

    Raises:
        RunError: they cannot.
    """
    o = options()
    if o.batch_size % strategy.num_replicas_in_sync:
        raise RunError(
            f"--batch_size must be a multiple of the {strategy.num_replicas_in_sync} replicas that share it. "
            f"Received: --batch_size={o.batch_size}"
        )
    return {
        "run_dir": FLAGS.run_dir,
        "steps": o.steps,
        "epochs": o.epochs,
        "resume": FLAGS.resume,
        "overwrite": FLAGS.overwrite,
        "settings": {name: getattr(o, name) for name in SETTINGS} | {"data": data},
        "schedule": schedule(),
        "checkpoint_minutes": FLAGS.checkpoint_minutes,
        "strategy": strategy,
    }
