"""The XLA flags that stf sets: added to a user's own, and in time for the first compilation."""

import os
import subprocess
import sys

import pytest

from stf import xla


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"),
        ("--xla_dump_to=there", "--xla_dump_to=there --xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true --xla_gpu_autotune_level=0"),
    ],
)
def test_flags_are_added_to_what_is_given(monkeypatch, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    xla.set_flags()
    xla.set_flags()
    assert os.environ["XLA_FLAGS"] == expected


def test_xla_reads_flags_that_are_set_after_tensorflow_is_imported(tmp_path):
    """A flag whose effect a CPU shows, set the way that `import stf` sets its own."""
    program = """
import sys
import tensorflow as tf
from stf import xla
xla.FLAGS["xla_dump_to"] = sys.argv[1]
xla.set_flags()
tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros([2]))
"""
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "dump")], check=True, capture_output=True, timeout=120
    )
    assert list((tmp_path / "dump").glob("*.txt"))
