"""XLA's settings that stf's models need, set when stf is imported."""

import os

# On Hopper, XLA's own matrix products through Triton gave wrong gradients in a loop over the blocks of the paper's
# model (TensorFlow 2.21; docs/xla.md). cuBLAS' gave the same bits twice, agreed with the uncompiled graph, and were
# faster. Autotuning picks matrix products by their times, others in every process: with it, what a run computes depends
# on chance in its last bits.
FLAGS = {"xla_gpu_enable_triton_gemm": "false", "xla_gpu_autotune_level": "0"}


def set_flags() -> None:
    """Adds `FLAGS` to the environment's XLA_FLAGS; a flag that is set there already is left as it is.

    XLA reads them at its first compilation: they hold for programs that are compiled after that, so stf must be
    imported before anything is compiled. Where it comes too late, gradients of a large model are wrong on some GPUs.
    """
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in FLAGS.items() if f"--{name}" not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
