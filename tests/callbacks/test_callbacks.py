"""What a run writes: checkpoints, scalars, pictures."""

import keras
import numpy as np
import paper_sets as sets
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
        "images/attention maps, layer 000",
        "images/attention maps, layer 001",
        "images/connectivity",
        "images/samples",
    } <= names
    norms = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("train/gradient_norm")]
    assert len(norms) == 2 and min(norms) > 0
    loaded = keras.saving.load_model(tmp_path / "checkpoint.keras")
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    np.testing.assert_array_equal(loaded(x).numpy(), model(x).numpy())
    assert [path.name for path in tmp_path.glob("*.keras")] == ["checkpoint.keras"]


def test_an_entry_is_of_the_batches_since_the_last_one(model, tmp_path):
    model.compile(stf.training.optimizer(0.0), stf.training.cross_entropy(), metrics=[stf.training.BitsPerDim()])
    x = tokens(12)
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(2).repeat()
    model.fit(
        data,
        steps_per_epoch=6,
        epochs=2,
        callbacks=[stf.callbacks.TrainingLog(tmp_path, every=2)],
        validation_data=(x[:1], x[:1]),
        verbose=0,
    )
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    losses = -stf.evaluation.score(model, x).reshape(6, -1).mean(1)
    for name, unit in (("train/bits_per_dim", np.log(2)), ("train/loss", 1.0)):
        found = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(name)]
        expected = [losses[k : k + 2].mean() / unit for k in (0, 2, 4)] * 2
        assert [step for step, _ in found] == [2, 4, 6, 8, 10, 12]
        np.testing.assert_allclose([value for _, value in found], expected, rtol=1e-5)
    rates = events.Tensors("train/tokens_per_second")
    assert [event.step for event in rates] == [4, 6, 8, 10, 12]  # not before the first step has been compiled
    assert all(float(tf.make_ndarray(event.tensor_proto)) > 0 for event in rates)


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


QUERIES = [50, 71]
NAMES = [["Local(window=18)"] * 2, ["Strided(stride=18)", "Fixed(18, 3, 1)"]]  # of each layer's heads
MASKS = [
    [sets.local(LENGTH, 18)] * 2,
    [sets.strided(LENGTH, 18), sets.merged_fixed(LENGTH, 18, 3, head=1)],
]


@pytest.fixture(scope="module")
def decided(model):
    """A model like `model`, whose scores are of size 1, so that no two weights of a query are alike."""
    decided = model.from_config(model.get_config())
    random = np.random.default_rng(2)
    for index in range(decided.num_blocks):
        weights = decided.stack.get_block_weights(index)
        drawn = {name: random.normal(size=weights[name].shape) for name in ("query_bias", "key_bias")}
        drawn |= {name: random.normal(size=weights[name].shape) / 4 for name in ("query_kernel", "key_kernel")}
        decided.stack.set_block_weights(index, drawn)
    return decided


def dense_weights(model, x):
    """Attention weights of each layer `[head, query, key]`, in float64 NumPy from the equations (Eqs. 2, 12-14)."""
    stream = model.embedding(x[None])[0].numpy().astype(np.float64)

    def normalized(stream, gamma, beta):
        centred = stream - stream.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta

    found = []
    for index, masks in enumerate(MASKS):
        w = {name: value.astype(np.float64) for name, value in model.stack.get_block_weights(index).items()}
        h = normalized(stream, w["attention_norm_gamma"], w["attention_norm_beta"])
        q, k, v = (
            np.stack(np.split(h @ w[f"{name}_kernel"] + w[f"{name}_bias"], model.num_heads, -1))
            for name in ("query", "key", "value")
        )
        scores = np.where(masks, q @ k.swapaxes(1, 2) / model.key_dim**0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found.append(weights / weights.sum(-1, keepdims=True))
        heads = np.concatenate(list(found[-1] @ v), -1)
        stream = stream + heads @ w["attention_output_kernel"] + w["attention_output_bias"]
        h = normalized(stream, w["feed_forward_norm_gamma"], w["feed_forward_norm_beta"])
        hidden = h @ w["hidden_kernel"] + w["hidden_bias"]
        stream = stream + hidden / (1 + np.exp(-1.702 * hidden)) @ w["output_kernel"] + w["output_bias"]
    return found


def test_attention_weights_are_those_of_a_dense_softmax(decided):
    x = tokens()[0]
    found = decided.attention_weights(x[None], QUERIES)
    assert len(found) == len(MASKS)
    for heads, dense, masks in zip(found, dense_weights(decided, x), MASKS, strict=True):
        for rows, weights, mask in zip(heads, dense, masks, strict=True):
            for query, (keys, given) in zip(QUERIES, rows, strict=True):
                np.testing.assert_array_equal(keys, np.flatnonzero(mask[query]))
                np.testing.assert_allclose(given, weights[query, keys][None], rtol=1e-4)
                assert given.std() > 0.2 * given.mean()  # another weight would be seen


def test_attention_maps_show_the_weights_of_a_dense_softmax(decided):
    """One picture for each layer, and in a row of its heads each query's: the whole figure, to a step of colour."""
    x = tokens()[0]
    maps = stf.callbacks.AttentionMaps("unused", x, SHAPE, queries=QUERIES)
    maps.set_model(decided)
    pictures, titles = [], []
    for layer, (dense, masks) in enumerate(zip(dense_weights(decided, x), MASKS, strict=True)):
        for head in range(2):
            for query in QUERIES:
                keys = np.flatnonzero(masks[head][query])
                pictures.append(drawing.attention_picture(keys, dense[head, query, keys], query, SHAPE))
                row, column = divmod(query // 3, 6)
                titles.append(f"layer {layer}, head {head}\n{NAMES[layer][head]}\nrow {row}, column {column}")
    heading = "Where chosen pixels (framed) look"
    expected = drawing.panels(pictures, 4, titles, heading=heading)
    figure = maps.figure()
    np.testing.assert_allclose(figure[: len(expected)].astype(int), expected.astype(int), atol=1)
    bar = figure[len(expected) : len(expected) + 12, 8:-8]
    np.testing.assert_array_equal(bar[[0, -1]], np.stack([drawing.heat(np.linspace(0, 1, bar.shape[1]))] * 2))
    alone = drawing.panels(pictures[4:], 2, titles[4:], heading=heading)
    np.testing.assert_allclose(maps.figure([1])[: len(alone)].astype(int), alone.astype(int), atol=1)


def test_connectivity_shows_each_pattern_once(decided):
    maps = stf.callbacks.AttentionMaps("unused", tokens()[0], SHAPE, queries=QUERIES)
    maps.set_model(decided)
    pictures, titles = [], []
    query = QUERIES[1]
    for layer, head in ((0, 0), (1, 0), (1, 1)):
        mask = MASKS[layer][head]
        pixels = np.where(mask[query].reshape(-1, 3).any(-1)[:, None], (120, 170, 235), 255)
        pixels[query // 3] = (20, 60, 150)
        pictures.append(drawing.enlarge(pixels.reshape(SHAPE), 6))
        connected = np.where(mask.reshape(24, 3, 24, 3).any((1, 3))[..., None], (120, 170, 235), 255)  # in pixels
        connected[np.triu_indices(24, 1)] = (200, 200, 204)
        connected[np.diag_indices(24)] = (20, 60, 150)
        pictures.append(connected)
        titles += [f"{NAMES[layer][head]}\none pixel's keys", "the first 72 queries\ndown, keys across"]
    expected = drawing.panels(pictures, 2, titles, heading="What the patterns connect")
    np.testing.assert_array_equal(maps.connectivity(), expected)


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


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [(stf.patterns.Strided(96), 384), (stf.patterns.Fixed(128, 32), 512), (stf.patterns.Causal(), 64)],
)
def test_connectivity_is_drawn_at_as_many_positions_as_show_it(pattern, shown):
    assert drawing.telling_positions(pattern, 0, 3072) == shown
    assert drawing.telling_positions(pattern, 0, 40) == 40


def test_a_smaller_connectivity_picture_keeps_every_line():
    pattern = stf.patterns.Strided(32)
    picture = drawing.connectivity_picture(pattern, 0, 256, size=64)
    blue = (picture == (120, 170, 235)).all(-1) | (picture == (20, 60, 150)).all(-1)
    pooled = pattern.mask(256).reshape(64, 4, 64, 4).any((1, 3))
    np.testing.assert_array_equal(blue, pooled | np.eye(64, dtype=bool))


def test_text_view_colours_what_a_key_has_read():
    view = stf.callbacks.views.TextView((8, 8), columns=6, rows=3)
    tokens = np.frombuffer(b"abcdefghij\nlmnopqrstuvwxyz", np.uint8)
    keys, weights = np.array([0, 2, 10, 19, 20]), np.array([0.3, 0.1, 0.05, 0.15, 0.4])
    picture = view.attention(tokens, keys, weights, 20)
    assert picture.shape == (3 * 15, 6 * 10, 3)
    assert "byte 20" in view.place(tokens, 20) and "3 are not shown" in view.place(tokens, 20)
    corners = picture[1::15, 1::10].reshape(-1, 3)  # of each cell, clear of letter and frame
    for byte in range(3, 20):  # key j has read byte j - 1; the first three bytes are not shown
        weight = dict(zip(keys - 1, weights, strict=True)).get(byte)
        expected = np.full(3, 70) if weight is None else drawing.heat(np.sqrt(weight / 0.4))
        np.testing.assert_array_equal(corners[byte - 3], expected)
    assert (picture[2 * 15, 5 * 10 : 6 * 10] == (90, 220, 255)).all(), "what comes next has the frame"


def test_wave_view_colours_the_columns_of_its_keys():
    view = stf.callbacks.views.WaveView((8, 8), size=(20, 16))
    tokens = np.full(64, 255, np.uint8)  # a line along the top
    picture = view.attention(tokens, np.array([0, 1, 20]), np.array([0.2, 0.2, 0.6]), 40)
    below = picture[10]
    np.testing.assert_array_equal(below[0], drawing.heat(np.sqrt(0.4 / 0.6)))
    np.testing.assert_array_equal(below[5], drawing.heat(np.array(1.0)))
    assert (below[[1, 4, 6, 9]] == 70).all() and (below[11:] == 0).all() and tuple(below[10]) == (90, 220, 255)
    assert (picture[0, 1] == drawing.INK).all()


@pytest.mark.parametrize("kind", ["text", "audio"])
def test_maps_of_text_and_sound_are_written_for_chosen_layers_and_heads(kind, tmp_path):
    made = stf.models.SparseTransformer(30, (5, 6), [stf.patterns.Fixed(6, 2)], 3, 4, 8, seed=1)
    made.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy())
    x = np.random.default_rng(0).integers(0, 256, (4, 30)).astype(np.int32)
    view = stf.callbacks.views.view_of((5, 6), kind)
    maps = stf.callbacks.AttentionMaps(tmp_path, x[0], view=view, layers=[2], heads=[3, 1])
    made.fit(x, x, batch_size=2, callbacks=[maps], verbose=0)
    titles, shapes = zip(*((title, picture.shape) for picture, title in maps._maps([2])[0]), strict=True)
    assert ["head 3" in titles[0], "head 1" in titles[1], len(titles), len(set(shapes))] == [True, True, 2, 1]
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    cards = {f"images/attention maps, layer 002, head {head}" for head in (3, 1)}
    assert cards | {"images/connectivity"} == set(events.Tags()["tensors"])
    for wrong in ({"layers": [3]}, {"heads": [4]}, {"layers": []}):
        with pytest.raises(ValueError, match="Received"):
            stf.callbacks.AttentionMaps(tmp_path, x[0], view=view, **wrong).set_model(made)


def test_text_and_sound_are_logged(tmp_path):
    stf.callbacks.log_text(tmp_path, "said", np.frombuffer("é one\ntwo".encode(), np.uint8), step=3)
    stf.callbacks.log_audio(tmp_path, "heard", np.arange(100) % 256, step=3)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert tf.make_ndarray(events.Tensors("said")[0].tensor_proto).item().decode() == "    é one\n    two"
    assert tf.make_ndarray(events.Tensors("heard")[0].tensor_proto).reshape(-1)[0][:4] == b"RIFF"


@pytest.mark.parametrize(
    "make",
    [
        lambda views: views.ImageView((8, 8)),
        lambda views: views.TextView((8, 8, 3)),
        lambda views: views.view_of((8, 8), "film"),
        lambda views: stf.callbacks.AttentionMaps("unused", np.zeros(65, int), view=views.TextView((8, 8))),
        lambda views: stf.callbacks.AttentionMaps("unused", np.zeros(9, int), view=views.TextView((8, 8)), queries=[9]),
    ],
)
def test_views_refuse_what_does_not_fit(make):
    with pytest.raises(ValueError, match="Received"):
        make(stf.callbacks.views)
