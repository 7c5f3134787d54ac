"""What a trained model knows of CIFAR-10's ten classes: a classifier of its features, and the model fine-tuned.

    python examples/finetune_cifar10.py --checkpoint=runs/cifar10/checkpoint.keras --data_dir=PATH
    python examples/finetune_cifar10.py --checkpoint=... --data_dir=PATH --epochs=10    # also trains all of the model
    python examples/finetune_cifar10.py --checkpoint=... --data_dir=PATH --epochs=10 --from_scratch  # its worth

The last line of output is JSON: shares of the test images that are named rightly. Blocks and regularization of the
classifier of features are chosen on the validation images.
"""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import stf

flags.DEFINE_string("checkpoint", None, "A .keras file of a model of CIFAR-10.", required=True)
flags.DEFINE_string("data_dir", None, "tensorflow-datasets' folder.")
flags.DEFINE_integer("epochs", 0, "Of training the whole model; 0 leaves it as it is.")
flags.DEFINE_integer("batch_size", 16, "Images of a step.")
flags.DEFINE_float("learning_rate", 1e-4, "Peak of the learning rate of the whole model.")
flags.DEFINE_bool("from_scratch", False, "Train the whole model from new weights, for comparison.")
flags.DEFINE_integer("limit", 0, "Only so many images of each split; 0 takes all.")
flags.DEFINE_integer("seed", 0, "Of the new layer and of the order of the images.")
FLAGS = flags.FLAGS
DECAYS = 1.0, 10.0, 100.0, 1000.0  # of the classifier of features


def linear(features, labels, decay):
    """Weights `[feature + 1, class]` of the least squares to one-hot labels, with so much ridge."""
    x = np.concatenate([features, np.ones((len(features), 1))], 1).astype(np.float64)
    wanted = np.eye(10)[labels]
    return np.linalg.solve(x.T @ x + decay * np.eye(x.shape[1]), x.T @ wanted)


def share_right(weights, features, labels):
    """Of features, by a linear classifier."""
    x = np.concatenate([features, np.ones((len(features), 1))], 1)
    return float(np.mean(np.argmax(x @ weights, 1) == labels))


def probe(model, images, labels):
    """The classifier of features: {block, validation, test}, of the block that validation likes best."""
    blocks = sorted({round(share * (model.num_blocks - 1)) for share in (0, 0.25, 0.5, 0.75, 1)})
    found = []
    for block in blocks:
        train, validation, test = (model.features(part, block, FLAGS.batch_size, verbose=1) for part in images)
        scale = train.std(0) + 1e-6
        train, validation, test = ((part - train.mean(0)) / scale for part in (train, validation, test))
        for decay in DECAYS:
            weights = linear(train, labels[0], decay)
            right = [share_right(weights, *part) for part in ((validation, labels[1]), (test, labels[2]))]
            found.append({"block": block, "decay": decay, "validation": right[0], "test": right[1]})
        best = max((each for each in found if each["block"] == block), key=lambda each: each["validation"])
        print(f"features of block {block}: validation {best['validation']:.3f}, test {best['test']:.3f}")
    return max(found, key=lambda each: each["validation"])


def classifier(model):
    """The model with a layer of ten classes in place of its logits; the same weights."""
    tokens = keras.Input((model.length,), dtype="int32")
    x = model.final_norm(model.stack(model.embedding(tokens)))
    x = keras.layers.GlobalAveragePooling1D(dtype="float32")(x)
    return keras.Model(tokens, keras.layers.Dense(10, dtype="float32")(x))


def fine_tune(model, images, labels):
    """Trains the whole model to name the classes; the share of the test images that it names rightly."""
    keras.utils.set_random_seed(FLAGS.seed)
    whole = classifier(model)
    steps = FLAGS.epochs * (len(images[0]) // FLAGS.batch_size)
    rate = stf.training.WarmupCosine(FLAGS.learning_rate, steps, steps // 20)
    whole.compile(
        optimizer=stf.training.optimizer(rate, 0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    examples = tf.data.Dataset.from_tensor_slices((images[0].astype(np.int32), labels[0]))
    examples = examples.shuffle(len(images[0]), seed=FLAGS.seed).batch(FLAGS.batch_size, drop_remainder=True)
    validation, test = (
        tf.data.Dataset.from_tensor_slices((x.astype(np.int32), y)).batch(FLAGS.batch_size)
        for x, y in zip(images[1:], labels[1:], strict=True)
    )
    whole.fit(examples, epochs=FLAGS.epochs, validation_data=validation)
    return whole.evaluate(test, return_dict=True)["accuracy"]


def main(_):
    logging.set_verbosity(logging.WARNING)
    if FLAGS.from_scratch and not FLAGS.epochs:
        raise app.UsageError("--from_scratch is for training the whole model. Received: --epochs=0")
    model = stf.models.SparseTransformer.from_preset(FLAGS.checkpoint)
    data, labels = stf.data.cifar10.load(FLAGS.data_dir), stf.data.cifar10.labels(FLAGS.data_dir)
    print(data.description)
    images, labels = ([part[: FLAGS.limit or None] for part in each] for each in (data[:3], labels))
    result = {"checkpoint": FLAGS.checkpoint, "images": len(images[0]), "features": probe(model, images, labels)}
    if FLAGS.epochs:
        if FLAGS.from_scratch:
            new = stf.models.SparseTransformer.from_config(model.get_config())
            result["from_scratch"] = fine_tune(new, images, labels)
        result["fine_tuned"] = fine_tune(model, images, labels)
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
