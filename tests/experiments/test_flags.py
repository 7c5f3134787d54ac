"""What a training program's flags and its preset's recipe come to."""

import keras
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

import stf
from stf.experiments import RunError
from stf.experiments import flags as ours


@pytest.fixture(scope="module", autouse=True)
def defined():
    ours.define("cifar10-small", "runs/test")


def parse(*arguments):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["program", *arguments])


@pytest.fixture(autouse=True)
def as_it_was():
    with flagsaver.flagsaver():
        yield
    keras.config.set_dtype_policy("float32")


def test_a_preset_alone_is_the_papers_run():
    parse("--preset=cifar10")
    o = ours.prepare()
    assert (o.learning_rate, o.warmup_steps, o.batch_size, o.weight_decay) == (0.00035, 5000, 16, 0.01)
    assert o.steps == 120 * 48_000 // 16 == 360_000 and o.epochs == 120
    assert keras.config.dtype_policy().name == o.policy == "mixed_bfloat16" and o.average == 0.999
    schedule = ours.schedule()
    assert schedule.total_steps == 360_000 and float(schedule(4999)) == pytest.approx(0.00035)


def test_the_papers_steps_are_its_epochs():
    recipes = stf.models.RECIPES
    assert recipes["enwik8"]["steps"] == 80 * 90_000_000 // 12_288 // 4
    assert recipes["imagenet64"]["steps"] == 70 * (1_281_149 // 128 + 1)
    assert recipes["cifar10-released"]["steps"] == 140 * 48_000 // 16
    released = stf.models.preset("cifar10-released")["patterns"]
    assert released == [stf.patterns.Local(96)] * 3 + [stf.patterns.Strided(96)]


def test_flags_go_before_the_recipe_and_short_runs_are_all_warm_up():
    parse("--steps=10", "--batch_size=2", "--average=0", "--epochs=20", "--weight_decay=0.1", "--accumulation_steps=2")
    o = ours.options()
    assert (o.steps, o.epochs, o.batch_size, o.average, o.learning_rate) == (10, 10, 2, None, 6e-3)
    assert ours.schedule().warmup_steps == 10
    model = ours.make_model()
    assert model.optimizer.weight_decay == 0.1 and model.optimizer.accumulation_steps == 2
    arguments = ours.run_arguments("bytes", tf.distribute.get_strategy())
    assert arguments["settings"]["data"] == "bytes" and arguments["settings"]["weight_decay"] == 0.1
    assert arguments["settings"]["policy"] == "float32" and "steps" not in arguments["settings"]


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--preset=cifar", "--preset must be one of .*Received: preset='cifar'"),
        ("--steps=0", "--steps must be 1 or more. Received: --steps=0"),
        ("--batch_size=-1", "--batch_size must be 1 or more"),
        ("--accumulation_steps=0", "--accumulation_steps must be 1 or more"),
    ],
)
def test_refusals(flag, says):
    parse(flag)
    with pytest.raises(RunError, match=says):
        ours.options()


def test_a_batch_that_gpus_cannot_share():
    class Three:
        num_replicas_in_sync = 3

    parse("--batch_size=4")
    with pytest.raises(RunError, match="multiple of the 3 replicas that share it. Received: --batch_size=4"):
        ours.run_arguments("bytes", Three())


def test_layers_and_heads_of_maps():
    parse("--num_blocks=3", "--map_layers=0,2", "--map_heads=1")
    assert stf.experiments.flags.map_options() == {"layers": [0, 2], "heads": [1]}
    parse("--num_blocks=3", "--map_layers=0,3")
    with pytest.raises(RunError, match="from 0 to 2. Received: --map_layers=0,3"):
        stf.experiments.flags.map_options()
