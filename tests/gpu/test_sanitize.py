"""The CUDA kernels under compute-sanitizer: sanitize.cu, which compares what they give with float64 too."""

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


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The program, of the objects that the PyTorch binding builds."""
    if shutil.which("compute-sanitizer") is None:
        pytest.fail("compute-sanitizer, a part of the CUDA toolkit, is not on the PATH")
    spec = importlib.util.spec_from_file_location(
        "torch_binding", ROOT / "custom_ops" / "attention" / "torch" / "binding.py"
    )
    binding = sys.modules["torch_binding"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(binding)
    objects = sorted(binding.build().parent.glob("*.o"))
    program = tmp_path_factory.mktemp("driver") / "sanitize"
    sources = [ROOT / "tests" / "gpu" / "sanitize.cu", ROOT / "tests" / "sanitize" / "dense_attention.cc"]
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT}", "-arch=native", "-o", program, *sources, *objects]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("kernels", ["", "sm80", "sm86"], ids=["best", "sm80", "sm86"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_nothing_is_found(driver, tool, kernels):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "2", driver]
    done = subprocess.run(command, env=os.environ | {"STF_CUDA_KERNELS": kernels}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0 and re.search(r"[ (]0 errors", done.stdout), done.stdout[-3000:]
