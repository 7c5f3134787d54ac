"""Builds the op library with Bazel when stf is built or installed, and packs it into a wheel for this platform."""

import pathlib
import shutil
import sys

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(pathlib.Path(__file__).parent / "custom_ops"))
import build as op_library  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent


class BuildPy(build_py):
    """Python files, the op library beside them, and the programs that the command `stf` runs."""

    def run(self):
        built = op_library.build()
        if self.editable_mode:
            return super().run()
        # A module that is gone from the sources must not come back from an earlier build.
        shutil.rmtree(pathlib.Path(self.build_lib) / "stf", ignore_errors=True)
        super().run()
        target = pathlib.Path(self.build_lib) / "stf" / "ops"
        target.mkdir(parents=True, exist_ok=True)
        for path in built:
            shutil.copy2(path, target)
        shutil.copytree(ROOT / "examples", target.parent / "examples", ignore=shutil.ignore_patterns("__pycache__"))


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the library uses TensorFlow's interface, not Python's."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Not pure: installed among platform-specific packages."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
