"""What stf finds on this machine, and whether it computes rightly here.

    python -m stf.doctor

Prints versions, the op library, the CPU's instruction set, the GPUs and what each will run, then holds attention and
its gradients on every device against the same formulas in float64. The exit code says whether all is well. Its whole
output is what a report of a bug should have in it.
"""

import os
import platform
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import stf
from stf.ops import library
from stf.ops.reference import reference_attention

POSITIONS, HEADS, DEPTH = 150, 2, 32
PATTERNS = {
    "causal": stf.patterns.Causal(),
    "local": stf.patterns.Local(40),
    "strided": stf.patterns.Local(12) | stf.patterns.Strided(12),
    "fixed": stf.patterns.Fixed(16, 4),
}
DTYPES = "float32", "bfloat16", "float16"
ALLOWED = 2.0  # times the error of the same formulas in the same dtype, spelled out in TensorFlow


def versions():
    """(name, version) of what stf stands on."""
    return [
        ("stf", stf.__version__),
        ("TensorFlow", tf.__version__),
        ("Keras", f"{keras.__version__}, backend {keras.backend.backend()}"),
        ("NumPy", np.__version__),
        ("Python", platform.python_version()),
        ("system", f"{platform.platform()}, {'-'.join(platform.libc_ver())}"),
        ("XLA_FLAGS", os.environ.get("XLA_FLAGS", "")),
    ]


def op_library():
    """(name, what is found) of the op library and of the CPU.

    Raises:
        LibraryNotFoundError: it is missing, or does not load.
    """
    library.load()
    cuda = ", ".join(library.architectures()) or "none"
    return [
        ("op library", f"{library.library_path()}; there is one for TensorFlow {', '.join(library.tensorflows())}"),
        ("its CUDA kernels", cuda if cuda == "none" else f"of compute capability {cuda}"),
        ("CPU", f"{_cpu_name()}, {os.cpu_count()} threads; the kernels run with {library.cpu_isa()}"),
    ]


def gpus():
    """(name, what it is and what it will run) of each GPU."""
    found = []
    for index, gpu in enumerate(tf.config.list_physical_devices("GPU")):
        details = tf.config.experimental.get_device_details(gpu)
        capability = details.get("compute_capability")
        name = details.get("device_name", gpu.name)
        version = ".".join(map(str, capability)) if capability else "unknown"
        found.append((f"GPU {index}", f"{name}, compute capability {version}; {kernels_for(capability)}"))
    return found or [("GPU", "none that TensorFlow sees")]


def kernels_for(capability):
    """What attention runs on a GPU of a compute capability, (major, minor) or None, in words."""
    if not library.has_cuda():
        return "the op library has no CUDA kernels, so that attention runs on the CPU"
    if capability is None:
        return "runs what its compute capability allows"
    if capability < (8, 0):
        return "too old: stf's kernels need compute capability 8.0 or later"
    if capability[0] == 9:
        return "bfloat16 and float16 run on Hopper's own kernels up to depth 128, all else on those of every card"
    return "runs the kernels of every card from compute capability 8.0 on"


def self_test(device):
    """Yields (pattern, dtype, largest error in the reference's own errors) on a device, each as it is found.

    An error is the norm of the difference from the same formulas in float64, of output or of a gradient, over that of
    the dense formulas in the dtype itself; 1 is as good as those, and above `ALLOWED` something is wrong.
    """
    draw = np.random.default_rng(0)
    arrays = [draw.standard_normal([2, POSITIONS, HEADS, DEPTH]) for _ in range(4)]
    for name, pattern in PATTERNS.items():
        for dtype in DTYPES:
            with tf.device(device):
                given = [tf.cast(tf.constant(array), dtype) for array in arrays]
                found = _results(stf.ops.attention, given, pattern)
            with tf.device("CPU"):
                exact = _results(reference_attention, [tf.cast(x, "float64") for x in given], pattern)
                spelled_out = _results(reference_attention, given, pattern)
            ratios = []
            for ours, theirs, truth in zip(found, spelled_out, exact, strict=True):
                least = np.finfo("float32").eps * np.linalg.norm(truth)
                ratios.append(np.linalg.norm(ours - truth) / max(np.linalg.norm(theirs - truth), least))
            yield name, dtype, float(np.max(ratios))


def _results(attention, given, pattern):
    """Output and gradients of query, key and value, float64 arrays."""
    *inputs, output_grad = given
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = attention(*inputs, pattern)
    grads = tape.gradient(output, inputs, output_grad)
    return [tf.cast(x, "float64").numpy() for x in (output, *grads)]


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    """Prints the report; returns the exit code."""
    begin = time.perf_counter()

    def say(rows):
        for name, found in rows:
            print(f"{name + ':':20s}{found}", flush=True)

    say(versions())
    try:
        say(op_library())
    except library.LibraryNotFoundError as error:
        print(f"op library: {error}")
        return 1
    say(gpus())
    devices = ["CPU:0"]
    if library.has_cuda():
        devices += [f"GPU:{index}" for index in range(len(tf.config.list_physical_devices("GPU")))]
    print(f"\nattention over {POSITIONS} positions, output and gradients:")
    print(f"error beside that of the dense formulas in the same dtype, at most {ALLOWED:g}")
    wrong = 0
    for device in devices:
        try:
            for pattern, dtype, deviation in self_test(device):
                good = deviation <= ALLOWED
                wrong += not good
                print(f"{device:8s}{pattern:10s}{dtype:10s}{deviation:7.3f}  {'ok' if good else 'WRONG'}", flush=True)
        except tf.errors.OpError as error:
            wrong += 1
            print(f"{device:8s}FAILED: {error.message}")
    print(f"\n{'all is well' if not wrong else f'{wrong} WRONG'}, {time.perf_counter() - begin:.1f} s")
    if wrong:
        print("Please report it with all of the above.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
