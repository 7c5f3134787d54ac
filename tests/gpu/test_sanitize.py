"""Attention's CUDA kernels under compute-sanitizer: sanitize.cu, which compares what they give with float64 too."""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).parents[2]
BINDING = ROOT / "custom_ops" / "attention" / "torch" / "binding.py"
# racecheck takes a warp's lanes that one lane arrives for at a barrier to be unsynchronized: there every lane arrives.
FLAGS = {"memcheck": (), "initcheck": (), "racecheck": ("-DSTF_RACECHECK",)}


@functools.cache
def driver(flags):
    """The program, of objects that the PyTorch binding builds with these flags."""
    spec = importlib.util.spec_from_file_location("torch_binding", BINDING)
    binding = sys.modules["torch_binding"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(binding)
    folder = ROOT / "build" / ("racecheck" if flags else "cuda")
    binding.build(folder, flags)
    program = folder / "sanitize"
    sources = [ROOT / "tests" / "gpu" / "sanitize.cu", ROOT / "tests" / "sanitize" / "dense_attention.cc"]
    objects = [path for path in folder.glob("*.o") if path.stem.startswith("kernels_") or has_source(path.stem)]
    subprocess.run(["nvcc", "-std=c++17", "-O3", f"-I{ROOT}", "-o", program, *sources, *objects], check=True)
    return program


def has_source(name):
    """Whether an object is of one of the attention kernels' host sources."""
    return any((ROOT / "custom_ops" / "attention" / "cuda").rglob(f"{name}.cc"))


@pytest.mark.parametrize("kernels", ["", "sm80", "sm86"], ids=["best", "sm80", "sm86"])
@pytest.mark.parametrize("tool", FLAGS)
def test_nothing_is_found(tool, kernels):
    assert shutil.which("compute-sanitizer"), "compute-sanitizer, a part of the CUDA toolkit, is not on the PATH"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "2", driver(FLAGS[tool])]
    done = subprocess.run(command, env=os.environ | {"STF_CUDA_KERNELS": kernels}, capture_output=True, text=True)
    print(done.stdout[-2000:])
    assert done.returncode == 0 and re.search(r"[ (]0 errors", done.stdout)
