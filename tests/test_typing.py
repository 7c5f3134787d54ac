"""Types: every public signature has them, and mypy tells right uses from wrong ones."""

import importlib
import inspect
import re
import subprocess
import sys
import types

import pytest
from conftest import TESTED

import stf

MODULES = [name for name in stf.__all__ if not name.startswith("__")]

# What a line is to be refused for stands behind it.
PROGRAM = """
from typing import assert_type

import numpy as np
import numpy.typing as npt

import stf

pattern = stf.patterns.Local(128) | stf.patterns.Strided(128)
assert_type(pattern, stf.patterns.Pattern)
assert_type(pattern.keys(7), npt.NDArray[np.int64])
assert_type(pattern.mask(7), npt.NDArray[np.bool_])
assert_type(pattern.pairs(7), int)
assert_type(stf.patterns.Local(2).window, int)
assert_type(stf.patterns.hops([pattern, stf.patterns.Sink(4)], 64), float)
stf.patterns.Blocks.from_rule(lambda row, column: row - column != 1, n=8, block_size=2)
stf.patterns.Blocks([[True, False], [True, False]], block_size=2)
stf.patterns.Local(0.5)  # arg-type
stf.patterns.Local(window="2")  # arg-type
stf.patterns.Strided()  # call-arg
stf.patterns.Fixed(128, 8).strides  # attr-defined
stf.patterns.Nearest(2)  # attr-defined
pattern | 3  # operator


@stf.patterns.register
class Sliding(stf.patterns.Local):
    def reach(self) -> int:
        return self.window


assert_type(Sliding(2).reach(), int)

stf.layers.StridedAttention(8, 64, 128, mode="merged", num_key_value_heads=2, name="attention", dtype="float32")
stf.layers.SparseAttention(8, 64, pattern=pattern, output_shape=(4, 4), rotary=True, kernel_initializer="zeros")
stf.layers.SparseResidualStack(4, [pattern], 8, 64, recompute="attention")
stf.layers.StridedAttention("8", 64, 128)  # arg-type
stf.layers.StridedAttention(8, 64)  # call-arg
stf.layers.StridedAttention(8, 64, 128, mode="mergde")  # arg-type
stf.layers.SparseAttention(8, 64, "local")  # arg-type
stf.layers.SparseResidualStack(4, pattern, 8, 64)  # arg-type

q = np.zeros((1, 8, 2, 4), np.float32)
stf.ops.attention(q, q, q, pattern, return_log_sum_exp=True)
stf.ops.attention(q, q, q)  # call-arg
stf.ops.attention(q, q, q, pattern, None)  # call-arg
stf.ops.attention(q, q, q, pattern, scale="1")  # arg-type

images, text = stf.data.cifar10.load(), stf.data.files.load_enwik8()
assert_type(images, stf.data.Splits[npt.NDArray[np.uint8]])
assert_type(text.train, stf.data.Stream)
assert_type(text.description, str)
data = stf.data.batches(images.train, 16, seed=0)
stf.data.crops(text.train, 12_288, 4, seed=0)
stf.data.batches(text.train, 16)  # arg-type

model = stf.models.SparseTransformer.from_preset("cifar10", dropout=0.1)
assert_type(model, stf.models.SparseTransformer)
model.compile(stf.training.optimizer(stf.training.WarmupCosine(1e-3, 10_000)), stf.training.cross_entropy())
model.fit(data, epochs=2, steps_per_epoch=100, callbacks=[stf.callbacks.Checkpoint("checkpoint.keras", minutes=10)])
assert_type(model.generate(2, top_p=0.9), npt.NDArray[np.int32])
assert_type(model.score(images.test), npt.NDArray[np.float32])
assert_type(stf.evaluation.evaluate(model, data), stf.evaluation.Evaluation)
model.generate(count=2)  # call-arg
model.generate(2, top_k=0.5)  # arg-type
stf.callbacks.Checkpoint()  # call-arg
stf.evaluation.evaluate(model)  # call-arg
"""


def public():
    """(name, function) of all that the modules' `__all__` name, methods of their classes included."""
    for module in MODULES:
        space = importlib.import_module(f"stf.{module}")
        for name in getattr(space, "__all__", [each for each in vars(space) if not each.startswith("_")]):
            yield from functions(f"stf.{module}.{name}", getattr(space, name))


def functions(name, value):
    if inspect.isfunction(value) and value.__module__.startswith("stf."):
        yield name, value
    elif inspect.ismodule(value) and value.__name__.startswith("stf."):
        for key, each in vars(value).items():
            if inspect.isfunction(each) and each.__module__ == value.__name__ and not key.startswith("_"):
                yield f"{name}.{key}", each
    elif inspect.isclass(value):
        for base in value.__mro__:
            if base.__module__.startswith("stf.") and not issubclass(base, tuple):
                yield from methods(name, base)


def methods(name, base):
    for key, value in vars(base).items():
        if key == "__init__" or not key.startswith("_"):
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(value, types.FunctionType) and value.__module__.startswith("stf."):
                yield f"{name}.{key}", value


@pytest.mark.parametrize("module", MODULES)
def test_every_public_signature_has_types(module):
    untyped = []
    for name, function in public():
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
        untyped += [f"{name}({each.name})" for each in own if each.annotation is each.empty]
        untyped += [name] * (signature.return_annotation is signature.empty)
    assert not [each for each in untyped if each.startswith(f"stf.{module}.")]


def test_mypy_tells_right_uses_from_wrong_ones(tmp_path):
    assert (TESTED / "py.typed").exists()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # In a folder without settings, as a user's own; what an installed package has wrong is not reported.
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--follow-imports=silent"]
    said = subprocess.run(
        [*command, "--cache-dir", tmp_path / "cache", program],
        cwd=tmp_path,
        env={"MYPYPATH": str(TESTED.parent)},
        capture_output=True,
        text=True,
    )
    found = dict(re.findall(r"^program\.py:(\d+): error: .*\[([a-z-]+)\]$", said.stdout, re.M))
    lines = enumerate(PROGRAM.split("\n"), 1)
    wanted = {str(number): line.partition("  # ")[2] for number, line in lines if "  # " in line}
    assert found == wanted, said.stdout + said.stderr
