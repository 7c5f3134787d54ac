"""Patterns as plain data: round trips through JSON, equality, representation, bad configs."""

import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from test_patterns import stacks

import stf
from stf import patterns
from stf.patterns import Blocks, Causal, Fixed, Local, OwnBlock, PerHead, Sink, Strided, Summary, Union, Window

EXAMPLES = [
    Causal(),
    Local(0),
    Strided(128),
    OwnBlock(16),
    Summary(16, 4),
    Summary(16, 4, 3),
    Sink(4),
    Window(5),
    Window(5) | Sink(2),
    Fixed(16, 4),
    Fixed(16, 4, 0),
    Blocks([[True, False], [True, True]], 8),
    Blocks(np.random.default_rng(1).random((3, 5, 5)) < 0.5, 8),
    Local(3) | Strided(4) | Summary(8, 2),
    PerHead([Local(3), Fixed(8, 2) | Local(1)]),
]


@pytest.mark.parametrize("pattern", EXAMPLES, ids=repr)
def test_round_trip(pattern):
    config = patterns.serialize(pattern)
    assert config["class_name"] == type(pattern).__name__
    again = patterns.deserialize(json.loads(json.dumps(config)))
    assert again == pattern and hash(again) == hash(pattern)
    assert patterns.serialize(again) == config
    assert patterns.get(config) == pattern == patterns.get(pattern)
    assert type(pattern).from_config(pattern.get_config()) == pattern
    assert patterns.deserialize({"module": "stf.patterns", "registered_name": None, **config}) == pattern


@given(stacks())
@settings(max_examples=50)
def test_round_trip_keeps_the_set(stack):
    parts, _, n = stack
    again = patterns.deserialize(json.loads(json.dumps(patterns.serialize(Union(parts)))))
    np.testing.assert_array_equal(again.mask(n), Union(parts).mask(n))


def test_equality_is_by_value_and_class():
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert Strided(4) != OwnBlock(4)
    assert Strided(4) == Strided(np.int64(4))
    assert Summary(8, 2) != Summary(8, 2, 0)
    assert Summary(8, 2).for_head(5) == Summary(8, 2, 1)
    layout = np.ones((2, 2), bool)
    pattern = Blocks(layout, 4)
    layout[0, 0] = False  # of the caller, who may do what they like with it
    assert pattern == Blocks(np.ones((2, 2), bool), 4)
    assert pattern != Blocks(layout, 4)


def test_unions_are_flat_and_have_no_part_twice():
    pattern = Local(1) | (Strided(2) | Local(1)) | Strided(2)
    assert pattern == Union([Local(1), Strided(2)])
    assert pattern.parts == (Local(1), Strided(2))


@pytest.mark.parametrize(
    "pattern, text",
    [
        (Causal(), "Causal()"),
        (Local(3) | Strided(4), "Local(window=3) | Strided(stride=4)"),
        (Union([Local(3)]), "Union([Local(window=3)])"),
        (Fixed(8, 2), "Fixed(stride=8, summary=2, sub_block=None)"),
        (PerHead([Causal(), Local(1)]), "PerHead([Causal(), Local(window=1)])"),
    ],
)
def test_representation_can_be_evaluated(pattern, text):
    assert repr(pattern) == text
    assert eval(text, vars(patterns)) == pattern


def test_representation_of_a_layout_is_short():
    pattern = Blocks(np.eye(100, dtype=bool), 8)
    assert repr(pattern) == "Blocks(layout=<100 x 100, 100 of 5050 blocks>, block_size=8)"


@pytest.mark.parametrize(
    "config",
    [
        "Causal",
        {},
        {"class_name": "Causal"},
        {"class_name": "Dense", "config": {}},
        {"class_name": "Pattern", "config": {}},
        {"class_name": "serialize", "config": {}},
        {"class_name": 3, "config": {}},
        {"class_name": "Local", "config": {"width": 3}},
        {"class_name": "Local", "config": {"window": -3}},
        {"class_name": "Local", "config": None},
        {"class_name": "Union", "config": {}},
        {"class_name": "Union", "config": {"parts": ["Causal"]}},
        {"class_name": "Blocks", "config": {"layout": ["10", "12"], "block_size": 4}},
        {"class_name": "Blocks", "config": {"layout": ["10", "1"], "block_size": 4}},
    ],
    ids=str,
)
def test_bad_configs_are_refused(config):
    with pytest.raises(ValueError, match="must|no pattern|does not fit"):
        patterns.deserialize(config)


class Dilated(Local):
    """A pattern of one's own: every second of the last positions."""

    def __init__(self, window):
        super().__init__(2 * window)

    def get_config(self):
        return {"window": self.window // 2}

    def _keys(self, i):
        return super()._keys(i)[::-2][::-1]

    def _mask(self, i, j):
        return super()._mask(i, j) & ((i - j) % 2 == 0)


class Recent(Union):
    """Another: a union with arguments of its own."""

    _arguments = ("window", "stride")

    def __init__(self, window, stride):
        super().__init__([Window(window), Strided(stride)])
        self.window, self.stride = window, stride


class Split(PerHead):
    """A pattern for each head, with an argument of its own."""

    _arguments = ("window",)

    def __init__(self, window):
        super().__init__([Window(window), Strided(window)])
        self.window = window


def test_patterns_of_ones_own_are_found_where_they_are_told_of():
    assert (repr(Recent(2, 5)), repr(Split(3))) == ("Recent(window=2, stride=5)", "Split(window=3)")
    for pattern in (Dilated(3), Recent(2, 5), Split(3)):
        name, config = type(pattern).__name__, patterns.serialize(pattern)
        with pytest.raises(ValueError, match=f"`stf.patterns.register`.* Received: class_name='{name}'"):
            patterns.deserialize(config)
        assert patterns.deserialize(config, {name: type(pattern)}) == pattern
        for outer in (PerHead([Sink(1) | pattern, Sink(2)]), PerHead([Sink(1), PerHead([pattern])])):
            config_of_outer = patterns.serialize(outer)
            assert patterns.deserialize(config_of_outer, {name: type(pattern)}) == outer
            with pytest.raises(ValueError, match=f"Received: class_name='{name}'"):
                patterns.deserialize(config_of_outer)
        with keras.saving.custom_object_scope({name: type(pattern)}):
            assert patterns.get(config) == pattern
        keras.saving.register_keras_serializable("mine")(type(pattern))
        assert patterns.deserialize(json.loads(json.dumps(config))) == pattern
        del keras.saving.get_custom_objects()[f"mine>{name}"]
        with pytest.raises(ValueError, match="names no pattern"):
            patterns.deserialize(config)
    keras.saving.register_keras_serializable("a", "Recent")(type("Layer", (keras.layers.Layer,), {}))
    keras.saving.register_keras_serializable("b", "Recent")(Recent)
    assert patterns.deserialize(patterns.serialize(Recent(2, 5))) == Recent(2, 5)
    for package in "ab":
        del keras.saving.get_custom_objects()[f"{package}>Recent"]
    try:
        assert patterns.register(Recent) is Recent
        assert patterns.deserialize(patterns.serialize(Recent(2, 5) | Sink(1))) == Recent(2, 5) | Sink(1)
    finally:
        patterns.serialization._registered.clear()
    for wrong in (Local, type("Strided", (Local,), {}), int, Local(2)):
        with pytest.raises(ValueError, match="`cls` must be a subclass of Pattern, not named as one"):
            patterns.register(wrong)


def test_a_saved_model_has_its_pattern_again(tmp_path):
    inputs = keras.Input([30, 8])
    layer = stf.layers.SparseAttention(2, 4, Recent(3, 4) | Sink(2))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    with pytest.raises((ValueError, TypeError), match="stf.patterns.register"):
        keras.saving.load_model(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Recent": Recent})
    assert again.layers[1].pattern == layer.pattern
    x = np.random.default_rng(0).standard_normal((2, 30, 8), np.float32)
    np.testing.assert_array_equal(again(x), model(x))


def test_a_layout_by_a_rule():
    layout = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    assert Blocks.from_rule(lambda row, column: layout[:, row, column], 11, 4) == Blocks(layout, 4)
    assert Blocks.from_rule(lambda row, column: row >= 0, 11, 4) == Blocks(np.ones((3, 3), bool), 4)
    with pytest.raises(ValueError, match="`layout` must be a bool array"):
        Blocks.from_rule(lambda row, column: row - column, 11, 4)
    with pytest.raises(ValueError, match="`n` must be an integer, 1 or more"):
        Blocks.from_rule(lambda row, column: row > column, 0, 4)
    for n in (4, 11):
        with pytest.raises(ValueError, match=rf"`rule` .* {-(-n // 4)} x {-(-n // 4)} blocks. .* shape \(2, 2\)"):
            Blocks.from_rule(lambda row, column: np.ones((2, 2), bool), n, 4)
