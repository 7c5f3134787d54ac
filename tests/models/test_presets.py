"""Presets: the paper's parameter counts, and that each one makes a model."""

import pytest

from stf.models import PRESETS, SparseTransformer, count_parameters, preset, presets


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cifar10", 59_196_928), ("enwik8", 94_949_888), ("imagenet64", 151_645_184)],
)
def test_the_papers_parameter_counts(name, parameters):
    assert count_parameters(preset(name)) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("audio-65k", 152e6), ("audio-262k", 25e6), ("audio-1m", 3e6)])
def test_audio_is_within_two_percent_of_the_papers_counts(name, parameters):
    assert count_parameters(preset(name)) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_each_makes_a_model_of_as_many_parameters(name):
    config = preset(name) | {"num_blocks": min(2, preset(name)["num_blocks"])}
    assert SparseTransformer(**config).count_params() == count_parameters(config)


@pytest.mark.parametrize("name", ["num_heads", "key_dim", "value_dim", "ff_dim"])
def test_a_size_of_0_is_not_taken_for_the_default(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        count_parameters(preset("cifar10-small") | {name: 0})


def test_the_table_has_a_line_for_each():
    lines = presets.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert "59,196,928" in lines[1]
