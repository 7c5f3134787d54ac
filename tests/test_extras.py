"""stf with TensorFlow, Keras and NumPy alone: what only examples need is asked for by name."""

import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from stf.extras import EXTRAS, needed

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
import stf
model = stf.models.SparseTransformer(8, (8,), [stf.patterns.Local(2)], 1, 1, 8)
tokens = np.zeros((2, 8), "int32")
model.compile("sgd", "sparse_categorical_crossentropy")
model.fit(tokens, tokens, verbose=0)
assert model.generate(2, verbose=1).shape == (2, 8) and model.score(tokens, verbose=1).shape == (2, 8)
assert model.features(tokens, verbose=1).shape == (2, 8)
asked = []
for call in (
    lambda: stf.callbacks.AttentionMaps("log", tokens),
    lambda: stf.callbacks.Samples("log"),
    lambda: stf.callbacks.TrainingLog("log"),
    lambda: stf.callbacks.drawing.grid(np.zeros((1, 2, 2, 3))),
    lambda: stf.data.photographs.load(),
    lambda: stf.data.cifar10.load(),
):
    try:
        call()
    except ImportError as error:
        asked.append(str(error))
print("asked:", *asked, sep="\\n")
"""


def test_without_the_extras_all_else_works_and_they_are_asked_for_by_name(tmp_path):
    program = PROGRAM.format(extras=set(EXTRAS))
    used = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert used.returncode == 0, used.stderr
    asked = used.stdout.partition("asked:\n")[2].splitlines()
    for extra in ("tensorboard", "tensorboard", "tensorboard", "images", "data", "data"):
        assert asked.pop(0).endswith(f"is needed here and not installed: pip install 'stf[{extra}]'"), used.stdout
    assert not asked


def names(lines):
    return {Requirement(line).name.lower() for line in lines}


def test_every_extra_brings_what_it_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra: names(lines) for extra, lines in project["optional-dependencies"].items()}
    distributions = importlib.metadata.packages_distributions()
    for module, extra in EXTRAS.items():
        assert extras[extra] & {name.lower() for name in distributions[module]}, f"{module} is not in {extra}"
    assert names(project["dependencies"]) == {"keras", "numpy", "tensorflow"}


def test_a_module_that_is_there_is_given():
    assert needed("PIL.Image").__name__ == "PIL.Image"
    with pytest.raises(KeyError):
        needed("nothing_of_ours")


def test_what_is_there_and_lacks_something_says_what(tmp_path, monkeypatch):
    (tmp_path / "soxr.py").write_text("import nothing_of_theirs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soxr", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_of_theirs'"):
        needed("soxr")
