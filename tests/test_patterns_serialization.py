"""Patterns as plain data: round trips through JSON, equality, representation, bad configs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from test_patterns import stacks

from stf import patterns
from stf.patterns import Blocks, Causal, Fixed, Local, OwnBlock, PerHead, Strided, Summary, Union

EXAMPLES = [
    Causal(),
    Local(0),
    Strided(128),
    OwnBlock(16),
    Summary(16, 4),
    Summary(16, 4, 3),
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
