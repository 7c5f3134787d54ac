"""What a run writes: checkpoints, scalars, pictures."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stf
from stf.callbacks import drawing

SHAPE = (4, 6, 3)
LENGTH = 72


@pytest.fixture(scope="module")
def model():
    patterns = [stf.patterns.Local(18), stf.patterns.PerHead([stf.patterns.Strided(18), stf.patterns.Fixed(18, 3)])]
    model = stf.models.SparseTransformer(LENGTH, SHAPE, patterns, 2, 2, 16, seed=1)
    model.compile(
        stf.training.optimizer(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[stf.training.BitsPerDim()],
    )
    return model


def tokens(count=4):
    return np.random.default_rng(0).integers(0, 256, (count, LENGTH)).astype(np.int32)


def test_scalars_pictures_and_checkpoint_of_a_run(model, tmp_path):
    log = tmp_path / "log"
    callbacks = [
        stf.callbacks.TrainingLog(log, every=1),
        stf.callbacks.AttentionMaps(log, tokens()[0], SHAPE),
        stf.callbacks.Samples(log, SHAPE, count=2, every=1),
        stf.callbacks.Checkpoint(tmp_path / "checkpoint.keras"),
    ]
    x = tokens()
    model.fit(x, x, batch_size=2, epochs=1, validation_data=(x, x), callbacks=callbacks, verbose=0)
    events = EventAccumulator(str(log), size_guidance={"tensors": 0}).Reload()
    names = set(events.Tags()["tensors"])
    assert {
        "train/bits_per_dim",
        "train/learning_rate",
        "train/gradient_norm",
        "validation/bits_per_dim",
        "images/attention maps",
        "images/connectivity",
        "images/samples",
    } <= names
    norms = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("train/gradient_norm")]
    assert len(norms) == 2 and min(norms) > 0
    loaded = keras.saving.load_model(tmp_path / "checkpoint.keras")
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    np.testing.assert_array_equal(loaded(x).numpy(), model(x).numpy())
    assert [path.name for path in tmp_path.glob("*.keras")] == ["checkpoint.keras"]


def test_checkpoint_leaves_the_last_good_one_when_saving_fails(model, tmp_path, monkeypatch):
    checkpoint = stf.callbacks.Checkpoint(tmp_path / "checkpoint.keras")
    checkpoint.set_model(model)
    checkpoint.save()
    checkpoint.wait()
    before = (tmp_path / "checkpoint.keras").read_bytes()

    def fail(_, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(stf.models.SparseTransformer, "save", fail)
    checkpoint.save()
    with pytest.raises(OSError, match="No space"):
        checkpoint.wait()
    assert (tmp_path / "checkpoint.keras").read_bytes() == before


def test_attention_maps_show_the_weights_of_the_dense_layer(model):
    maps = stf.callbacks.AttentionMaps("unused", tokens()[0], SHAPE, queries=[50])
    maps.set_model(model)
    found = model.attention_weights(tokens()[:1], [50])
    assert len(found) == 2
    for index, heads in enumerate(found):
        for head, rows in enumerate(heads):
            keys, weights = rows[0]
            np.testing.assert_array_equal(keys, model.patterns[index].keys(50, head))
            assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert maps.figure().shape[-1] == 3 and maps.connectivity().shape[-1] == 3


def test_attention_picture_is_black_after_the_query_grey_where_it_does_not_look():
    keys = np.array([0, 1, 2, 30])
    picture = drawing.attention_picture(keys, np.array([0.1, 0.1, 0.1, 0.7]), 35, SHAPE, factor=8)
    pixels = picture[4::8, 4::8].reshape(-1, 3)  # the middle of each, clear of the frame
    assert (pixels[12:] == 0).all()
    assert (pixels[1:10] == 70).all() and (pixels[11] == 70).all()
    assert (pixels[10] == drawing.heat(np.array(1.0))).all()
    assert (pixels[0] == drawing.heat(np.sqrt(0.3 / 0.7))).all(), "a pixel has the sum over its channels"


@pytest.mark.parametrize("pattern", [stf.patterns.Local(7), stf.patterns.Strided(5), stf.patterns.Fixed(6, 2)])
def test_connectivity_picture_is_the_mask_where_a_pixel_is_a_position(pattern):
    picture = drawing.connectivity_picture(pattern, 0, 40, size=40)
    attended = (picture == (120, 170, 235)).all(-1) | (picture == (20, 60, 150)).all(-1)
    np.testing.assert_array_equal(attended, pattern.mask(40))


def test_grid_keeps_every_pixel():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    picture = drawing.grid(images, columns=3, factor=2, gap=1)
    assert picture.shape == (2 * 9 + 1, 3 * 9 + 1, 3)
    np.testing.assert_array_equal(picture[10:18:2, 10:18:2], images[4])


@pytest.mark.parametrize(
    "arguments",
    [
        dict(tokens=np.zeros(5)),
        dict(tokens=np.zeros(LENGTH), queries=[LENGTH]),
        dict(tokens=np.zeros(LENGTH), queries=[-1]),
    ],
)
def test_attention_maps_refuse_what_does_not_fit(arguments):
    with pytest.raises(ValueError, match="Received"):
        stf.callbacks.AttentionMaps("unused", image_shape=SHAPE, **arguments)


def test_checkpoint_refuses_another_ending():
    with pytest.raises(ValueError, match="path"):
        stf.callbacks.Checkpoint("model.h5")


def test_a_run_goes_on_after_a_few_broken_steps_and_ends_after_many():
    patterns = [stf.patterns.Local(6)]

    def broken_model(place):
        made = stf.models.SparseTransformer(24, (4, 6), patterns, 2, 2, 8, vocab_size=16, seed=1)
        made.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy())
        place(made)
        return made

    def of_block(index, name):
        def place(made):
            weights = made.stack.get_block_weights(index)[name]
            made.stack.set_block_weights(index, {name: np.full_like(weights, np.nan)})

        return place

    x = np.random.default_rng(0).integers(0, 16, (12, 24)).astype(np.int32)
    cases = {
        "embedding": lambda m: m.embedding.tokens.assign(np.full((16, 8), np.nan)),
        "block_1.attention": of_block(1, "value_kernel"),
        "block_0.feed_forward": of_block(0, "hidden_kernel"),
        "block_1.feed_forward": of_block(1, "output_bias"),
        "final_norm": lambda m: m.final_norm.beta.assign(np.full(8, np.nan)),
        "logits": lambda m: m.logits.kernel.assign(np.full((8, 16), np.nan)),
    }
    for name, place in cases.items():
        made = broken_model(place)
        assert stf.callbacks.first_non_finite(made, x[:1]) == name
    with pytest.raises(FloatingPointError, match=r"4 steps in a row .*\(limit=3\).* logits "):
        made.fit(x, x, batch_size=2, verbose=0, callbacks=[stf.callbacks.StopOnNonFinite(limit=3, every=2)])
    assert int(made.optimizer.skipped) == 4 and int(made.optimizer.iterations) == 0
    made.fit(x, x, batch_size=2, verbose=0, callbacks=[stf.callbacks.StopOnNonFinite(limit=100, every=1)])
    assert int(made.optimizer.skipped) == 10
    with pytest.raises(ValueError, match="limit=0"):
        stf.callbacks.StopOnNonFinite(limit=0)


def test_nothing_is_named_where_all_is_finite(model):
    assert stf.callbacks.first_non_finite(model, tokens(1)) is None
