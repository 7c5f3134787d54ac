"""stf.doctor: what it says of a machine, and that it finds what is wrong."""

import os
import subprocess
import sys

import pytest
import tensorflow as tf

from stf import doctor
from stf.ops import library


def test_a_report_of_this_machine():
    done = subprocess.run([sys.executable, "-m", "stf.doctor"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("stf:", "TensorFlow:", "op library:", "CPU:", "GPU", "XLA_FLAGS:", "all is well"):
        assert line in done.stdout
    assert f"the kernels run with {library.cpu_isa()}" in done.stdout
    tested = [line for line in done.stdout.splitlines() if line.startswith("CPU:0 ")]
    assert len(tested) == len(doctor.PATTERNS) * len(doctor.DTYPES) and all(line.endswith("ok") for line in tested)


@pytest.mark.parametrize("scale", [1.02, float("nan")])
def test_what_is_wrong_is_found(scale, monkeypatch, capsys):
    right = doctor.stf.ops.attention
    monkeypatch.setattr(doctor.stf.ops, "attention", lambda *args: right(*args) * tf.constant(scale, args[0].dtype))
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "WRONG" in said and "all is well" not in said and "report it" in said


def test_a_missing_library_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load.cache_clear()
    try:
        assert doctor.main() == 1
    finally:
        library.load.cache_clear()
    assert "missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "capability, cuda, words",
    [
        ((9, 0), True, "Hopper"),
        ((8, 6), True, "every card"),
        ((12, 0), True, "every card"),
        ((7, 5), True, "too old"),
        (None, True, "compute capability"),
        ((9, 0), False, "on the CPU"),
    ],
)
def test_what_a_gpu_will_run(capability, cuda, words, monkeypatch):
    monkeypatch.setattr(library, "has_cuda", lambda: cuda)
    assert words in doctor.kernels_for(capability)


@pytest.mark.parametrize("asked", ["generic", "avx2"])
def test_the_instruction_set_is_what_was_asked_for(asked):
    command = "from stf.ops import library; print(library.cpu_isa())"
    env = os.environ | {"STF_CPU_ISA": asked}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=env)
    assert done.stdout.split()[-1:] == [asked], done.stderr
