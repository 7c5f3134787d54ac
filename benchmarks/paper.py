"""The paper's Table 2 at our scale: patterns trained alike on real data, for the same minutes, on one GPU.

    python benchmarks/paper.py --data=cifar10 --path=PATH                  # benchmarks/results/paper_cifar10.json
    python benchmarks/paper.py --data=enwik8 --path=FILE --minutes=10
    python benchmarks/paper.py --data=cifar10 --path=PATH --rows=strided   # one row; the file keeps the others
    python benchmarks/paper.py --data=cifar10 --path=PATH --minutes=10     # each row goes on to ten minutes
    python benchmarks/paper.py --data=cifar10 --path=PATH --num_blocks=8 --rows=strided --steps=1000 --brief \
        --every=50 --policy=mixed_bfloat16,mixed_float16,float32 --output=benchmarks/results/paper_policies.json
    python benchmarks/paper.py --data=cifar10 --path=PATH --num_blocks=2 --rows=small,small_augmented --steps=2000 \
        --examples=50 --warmup=100 --minutes=30 --every=250 --brief --output=benchmarks/results/paper_augmented.json
    python benchmarks/paper_plot.py                                        # the curves, docs/paper_*.svg

Each row trains the preset's model, at its full width, with as many blocks as --num_blocks says, by the preset's recipe:
its batch, rate, decay, average and policy; a warm-up, then a constant rate, so that any two points of two curves may be
compared, at the same step or at the same minute. Minutes are those of training; compilation, validation and checkpoints
do not count. Validation is of the moving average of the weights. Where it was lowest, the test split is evaluated in
float32: mean bits with their standard error over examples, beside what needs no training: order-0 entropy, PNG and
lossless WebP (images), xz -9 (text). --run_dir keeps a checkpoint of each row, and the model of its lowest validation
in best.keras, from which examples/generate.py, attention_maps.py and evaluate.py go on.
"""

import argparse
import io
import json
import lzma
import math
import os
import pathlib
import platform
import re
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

import stf
from stf.patterns import Local

HERE = pathlib.Path(__file__).resolve().parent
TOLD = {"conditions": stf.data.ImageTransformations(stf.data.cifar10.SHAPE).sizes}
ROWS = {  # of each data set: (preset, what is changed in the model)
    "cifar10": {
        "strided": ("cifar10", {}),
        "fixed": ("cifar10-fixed", {}),
        "dense": ("cifar10-dense", {}),
        "local": ("cifar10", {"patterns": [Local(96)]}),
        "augmented": ("cifar10", TOLD),
        "small": ("cifar10-small", {}),
        "small_augmented": ("cifar10-small", TOLD),
    },
    "enwik8": {
        "fixed": ("enwik8", {}),
        "strided": ("enwik8-strided", {}),
        "dense": ("enwik8-dense", {}),
        "local": ("enwik8", {"patterns": [Local(128)]}),
        "windows": ("enwik8-windows", {}),
    },
}
TABLE = "strided", "fixed", "dense", "local"  # the rows unless others are asked for
BLOCKS = {"cifar10": 32, "enwik8": 12}
READ_ON = "fixed"  # the Enwik8 row of Table 3, dynamic evaluation and a text
CONTEXTS = (0, 6144, 9216, 10752, 11904, 12096, 12160)  # of Table 3
CONTEXT_WINDOWS = 4  # so many times the length is read for Table 3: the longest context takes 96 windows for each
NEW = 1024  # bytes that dynamic evaluation learns from at a time
RATES = 3e-5, 1e-4, 3e-4, 1e-3  # of dynamic evaluation, chosen among on the validation split


class Curve(keras.callbacks.Callback):
    """Ends a `fit` after so many minutes of training, and keeps what it has found; put before `MovingAverage`.

    Args:
        minutes: of training: neither what the first step takes, which is compiled, nor validation counts.
        steps: after which it ends too; None: never.
        points: what an earlier part of the run has found, which is added to.
        folder: where the model of the lowest validation goes, as best.keras, and checkpoint.keras every two minutes.
        found: function of the points, called after each epoch.
        since: points up to this step do not count as the lowest.
    """

    def __init__(self, minutes, steps, points, folder, found, since=0):
        super().__init__()
        self.steps = steps or math.inf
        self.minutes, self.points, self.folder, self.found = minutes, points, folder, found
        self._seconds = points[-1]["seconds"] if points else 0.0
        self._lowest = min((point["validation"] for point in points if point["step"] > since), default=math.inf)
        self._checkpoint = stf.callbacks.Checkpoint(folder / "checkpoint.keras", verbose=0)

    def on_train_begin(self, logs=None):
        self._checkpoint.set_model(self.model)
        self._saved = time.perf_counter()
        self._first = True
        self._bar = tqdm(total=round(60 * self.minutes), initial=round(self._seconds), desc=self.folder.name, unit="s")

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if self._first:
            self._step, self._first = stf.training.steps_taken(self.model.optimizer), False  # waits for the device
            self._begin = time.perf_counter()

    def on_test_begin(self, logs=None):
        self._step = stf.training.steps_taken(self.model.optimizer)
        self._seconds += time.perf_counter() - self._begin

    def on_test_end(self, logs=None):
        if logs["bits_per_dim"] < self._lowest:
            self._lowest = float(logs["bits_per_dim"])
            stf.evaluation.in_float32(self.model).save(self.folder / "best.keras")

    def on_epoch_end(self, epoch, logs=None):
        bits = {"train": float(logs["bits_per_dim"]), "validation": float(logs["val_bits_per_dim"])}
        self.points.append({"step": self._step, "seconds": self._seconds} | bits)
        self.found(self.points)
        over = self._seconds >= 60 * self.minutes or self._step >= self.steps
        if over or time.perf_counter() - self._saved > 120:
            self._checkpoint.save()
            self._saved = time.perf_counter()
        self._bar.update(min(round(self._seconds), self._bar.total) - self._bar.n)
        self._bar.set_postfix({"step": self._step} | {name: f"{x:.3f}" for name, x in bits.items()})
        self.model.stop_training = over

    def on_train_end(self, logs=None):
        self._bar.close()
        self._checkpoint.wait()


def load(kind, path):
    """The splits."""
    return stf.data.cifar10.load(path) if kind == "cifar10" else stf.data.files.load_enwik8(path)


def datasets(kind, splits, model, batch_size, seen, most):
    """(endless training batches behind those seen, validation batches, test batches)."""
    if kind == "cifar10":
        transformations = stf.data.ImageTransformations(stf.data.cifar10.SHAPE) if model.conditions else None
        return (
            stf.data.batches(splits.train, batch_size, 0, seen, transformations=transformations),
            stf.data.batches(splits.validation[: most or None], batch_size),
            stf.data.batches(splits.test, batch_size),
        )
    length = model.length
    return (
        stf.data.crops(splits.train, length, batch_size, 0, seen),
        stf.data.windows(splits.validation.head(most * length), length, batch_size),
        stf.data.windows(splits.test, length, batch_size, length // 2),
    )


def packed(kind, test):
    """Bits a byte of what needs no training."""
    found = {"order-0 entropy": stf.data.order0_entropy(test)}
    if kind == "enwik8":
        data = test.read(0, len(test)).tobytes()
        return found | {"xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data)}
    for name, options in (("PNG", {"optimize": True}), ("WebP", {"lossless": True, "quality": 100, "method": 6})):
        total = 0
        for image in test.reshape(-1, 32, 32, 3):
            file = io.BytesIO()
            Image.fromarray(image).save(file, name, **options)
            total += file.tell()
        found[f"{name}, lossless" if name == "WebP" else name] = 8 * total / test.size
    return found


def make_model(preset, changed, recipe, options):
    """A row's model, compiled."""
    model = stf.models.SparseTransformer.from_preset(
        preset, seed=options.seed, num_blocks=options.num_blocks, recompute=False, **changed
    )
    rate = stf.training.WarmupCosine(recipe["learning_rate"], 10**9, options.warmup)  # its cosine begins as a constant
    model.compile(
        optimizer=stf.training.optimizer(rate, recipe["weight_decay"], average=recipe["average"]),
        loss=stf.training.cross_entropy(),
        weighted_metrics=[stf.training.BitsPerDim()],
    )
    return model


def train(kind, name, policy, splits, options, found):
    """A row, trained to the minutes or on to them; `found` is called with it as it grows."""
    preset, changed = ROWS[kind][name]
    recipe = stf.models.recipe(preset)
    policy = policy or recipe["policy"]
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(policy)
    folder = (
        options.run_dir
        / kind
        / "-".join(
            [name, *([policy] if options.policy else []), *([str(options.examples)] if options.examples else [])]
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    points, points_path = [], folder / "points.json"
    since = 0  # steps up to here do not count as the lowest: after a kill best.keras may be of one that is forgotten
    settings = {name: getattr(options, name) for name in ("num_blocks", "warmup", "seed", "examples")}
    if stf.callbacks.checkpoint.exists(folder / "checkpoint.keras"):
        model = stf.callbacks.load_checkpoint(folder / "checkpoint.keras")
        done, before = stf.training.steps_taken(model.optimizer), json.loads(points_path.read_text())
        if before["settings"] != settings:
            sys.exit(f"{folder} was begun with {before['settings']}. Received: {settings}. Name another --run_dir.")
        points = [point for point in before["points"] if point["step"] <= done]
        since = done if len(points) < len(before["points"]) else before["since"]
    else:
        model = make_model(preset, changed, recipe, options)
    batch_size, done = recipe["batch_size"], stf.training.steps_taken(model.optimizer)
    training, validation, test = datasets(kind, splits, model, batch_size, done, options.validation)
    row = {
        "row": folder.name,
        "preset": preset,
        "patterns": [repr(pattern) for pattern in changed.get("patterns", stf.models.preset(preset)["patterns"])],
        "policy": policy,
        "num_blocks": model.stack.num_blocks,
        "parameters": model.count_params(),
        "examples": options.examples or None,
        "tokens_a_step": batch_size * model.length,
        "learning_rate": recipe["learning_rate"],
    }

    def write(points):
        points_path.write_text(json.dumps({"settings": settings, "since": since, "points": points}))
        found(row | {"points": points})

    steps = options.steps or math.inf
    if not points or (points[-1]["seconds"] < 60 * options.minutes and points[-1]["step"] < steps):
        model.fit(
            training,
            steps_per_epoch=options.every,
            epochs=10**6,
            validation_data=validation,
            callbacks=[
                Curve(options.minutes, options.steps, points, folder, write, since),
                stf.callbacks.MovingAverage(),
                stf.callbacks.StopOnNonFinite(),
            ],
            verbose=0,
        )
    first, last = points[0], points[-1]
    lowest = min((point for point in points if point["step"] > since), key=lambda point: point["validation"])
    best = keras.saving.load_model(folder / "best.keras")
    row |= {
        "ms_a_step": 1e3 * (last["seconds"] - first["seconds"]) / max(last["step"] - first["step"], 1),
        "lowest": lowest,
        "test": tested(best, test, model.length if kind == "cifar10" else 4096),
    }
    if options.brief:
        pass
    elif kind == "cifar10":
        draw(best, splits.test[:8], folder)
    elif name == READ_ON:
        row["contexts"] = contexts(best, splits.test)
        row["dynamic"] = dynamic(best, splits)
        text = best.generate(prefix=splits.test.read(0, 1024), length=2048, seed=0, temperature=0.8)
        (folder / "completion.txt").write_bytes(text[0].astype(np.uint8).tobytes())
    found(row | {"points": points})


def draw(model, images, folder):
    """samples.png, and completions.png: the halves that are given, their completions, the images."""
    shape = (len(images), *model.position_shape)
    hidden = images.copy().reshape(shape)
    hidden[:, shape[1] // 2 :] = 0
    completed = model.generate(prefix=images[:, : images.shape[1] // 2], seed=0).reshape(shape)
    drawn = model.generate(len(images), seed=0).reshape(shape)
    for name, pictures in (("samples", drawn), ("completions", [*hidden, *completed, *images.reshape(shape)])):
        Image.fromarray(stf.callbacks.drawing.grid(pictures, len(images))).save(folder / f"{name}.png")


def tested(model, dataset, group):
    """Mean bits of the test split, and their standard error over groups of so many tokens, each taken as one draw."""
    found = stf.evaluation.evaluate(model, dataset)
    bits = found.losses[: len(found.losses) // group * group].reshape(-1, group).mean(1, dtype=np.float64) / math.log(2)
    error = float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else None
    return {"bits": found.bits, "standard_error": error, "tokens": found.tokens}


def contexts(model, test):
    """Table 3: bits by the least context of a counted byte, of the same bytes of the test split."""
    found, read = [], test.head(CONTEXT_WINDOWS * model.length)
    for context in CONTEXTS:
        bits = stf.evaluation.evaluate(model, stf.data.windows(read, model.length, 4, context)).bits
        found.append({"context": context, "bits": bits})
    return found


def dynamic(model, splits):
    """Bits of the test split by a model that learns as it reads, beside one that does not, of the same windows."""

    def read(stream):
        return stf.data.windows(stream, model.length, 1, model.length - NEW)

    scales = stf.evaluation.gradient_scales(model, read(splits.train.head(4 * model.length)))
    some = read(splits.validation.head(2 * model.length))
    tried = [
        {"rate": rate, "validation": stf.evaluation.evaluate_dynamically(model, some, scales, rate).bits}
        for rate in RATES
    ]
    rate = min(tried, key=lambda each: each["validation"])["rate"]
    return {
        "static": stf.evaluation.evaluate(model, read(splits.test)).bits,
        "dynamic": stf.evaluation.evaluate_dynamically(model, read(splits.test), scales, rate).bits,
        "rate": rate,
        "tried": [{"rate": 0.0, "validation": stf.evaluation.evaluate(model, some).bits}, *tried],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=ROWS, required=True)
    parser.add_argument("--path", help="tensorflow-datasets' folder, or Enwik8's file")
    parser.add_argument("--rows", help="some of the rows, by name")
    parser.add_argument("--minutes", type=float, default=5, help="of training, of each row")
    parser.add_argument("--num_blocks", type=int, help="of the model, in place of the paper's")
    parser.add_argument("--examples", type=int, default=0, help="images to train on: rows of their own")
    parser.add_argument("--steps", type=int, help="after which a row ends too")
    parser.add_argument("--brief", action="store_true", help="no pictures, no texts, no contexts")
    parser.add_argument("--policy", help="dtype policies, in place of the recipe's: rows of their own")
    parser.add_argument("--warmup", type=int, default=500, help="steps of warm-up")
    parser.add_argument("--every", type=int, default=100, help="steps between two validations")
    parser.add_argument("--validation", type=int, default=64, help="sequences of a validation; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run_dir", type=pathlib.Path, default=pathlib.Path("runs/paper"))
    parser.add_argument("--output", type=pathlib.Path, help="the JSON; benchmarks/results/paper_<data>.json")
    options = parser.parse_args()
    options.num_blocks = options.num_blocks or BLOCKS[options.data]
    output = options.output or HERE / "results" / f"paper_{options.data}.json"
    splits = load(options.data, options.path)
    if options.examples:
        if options.data != "cifar10":
            parser.error(f"--examples is for --data=cifar10. Received: --data={options.data}")
        if not 0 < options.examples <= len(splits.train):
            parser.error(f"--examples must be of {len(splits.train)} images. Received: --examples={options.examples}")
        used = f"{splits.description}; {options.examples} used to train"
        splits = splits._replace(train=splits.train[: options.examples], description=used)
    print(splits.description)
    result = {"rows": []}
    if output.exists():
        result = json.loads(output.read_text())
    result |= {"data": splits.description.split(": ", 1)[-1], "packed": packed(options.data, splits.test)}

    def found(row):
        """Into the file, in place of an earlier row of this name."""
        row |= machine()
        names = [each["row"] for each in result["rows"]]
        if row["row"] in names:
            result["rows"][names.index(row["row"])] = row
        else:
            result["rows"].append(row)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")

    for name in (options.rows or ",".join(TABLE)).split(","):
        if name not in ROWS[options.data]:
            parser.error(f"--rows must be some of {', '.join(ROWS[options.data])}. Received: {name}")
        for policy in options.policy.split(",") if options.policy else [None]:
            train(options.data, name, policy, splits, options, found)
            keras.backend.clear_session()
    print(table(result))
    print(f"written: {output}")


def machine():
    """What it ran on."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
    return {
        "machine": names[0] if names else platform.processor() or platform.machine(),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "python": platform.python_version()},
        "command": " ".join(
            ["python benchmarks/paper.py", *(re.sub(r"^(--path)=.*", r"\1=PATH", a) for a in sys.argv[1:])]
        ),
    }


def table(result):
    """The rows as text."""
    lines = [result["data"]]
    for row in result["rows"]:
        if "test" not in row:
            continue
        test, lowest = row["test"], row["lowest"]
        error = f" +- {test['standard_error']:.3f}" if test["standard_error"] else ""
        lines.append(
            f"{row['row']:24s}{row['num_blocks']:4d} blocks{row['parameters']:13,} parameters{row['ms_a_step']:8.1f} ms"
            f"{row['points'][-1]['step']:8,} steps  lowest validation {lowest['validation']:.3f} at step"
            f" {lowest['step']:,}  test {test['bits']:.3f}{error}"
        )
    lines += [f"{name:24s}{bits:.3f}" for name, bits in result["packed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
