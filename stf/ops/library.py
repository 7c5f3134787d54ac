"""Finds and loads the op library, its face for this TensorFlow over the kernels, once, when an op is first called."""

import ctypes
import functools
import json
import pathlib

import tensorflow as tf

FOLDER = pathlib.Path(__file__).resolve().parent
BUILD = "Build it with `make lib` in a checkout, or install stf with `pip install .`"


class LibraryNotFoundError(ImportError):
    """The op library is not there, or was built without what is asked of it, such as for this TensorFlow."""


def library_path() -> pathlib.Path:
    """Where the part of the op library for this TensorFlow belongs, as a `pathlib.Path`."""
    return FOLDER / f"libstf_ops_{_minor_version().replace('.', '_')}.so"


def kernels_path():
    """Where the op library's kernels belong, which know nothing of TensorFlow, as a `pathlib.Path`."""
    return FOLDER / "libstf_kernels.so"


def tensorflows():
    """The minor versions of TensorFlow that the op library was built for, such as "2.21"."""
    found = (path.stem.removeprefix("libstf_ops_").split("_") for path in FOLDER.glob("libstf_ops_*.so"))
    return [".".join(version) for version in sorted(found, key=lambda version: [int(number) for number in version])]


@functools.cache
def load():
    """The module of the library's ops.

    Raises:
        LibraryNotFoundError: says what to do.
    """
    path, built = library_path(), tensorflows()
    if not built:
        raise LibraryNotFoundError(f"stf's op library is missing: no file {path}. {BUILD}.")
    if _minor_version() not in built:
        raise LibraryNotFoundError(
            f"stf's op library in {FOLDER} is for TensorFlow {', '.join(built)}, and this is TensorFlow "
            f"{tf.__version__}. Install one that it is for, or build it for this one: `make lib` in a checkout, or "
            "`pip install --no-build-isolation .`"
        )
    try:
        module = tf.load_op_library(str(path))
    except tf.errors.NotFoundError as error:
        raise LibraryNotFoundError(
            f"stf's op library {path} does not load with TensorFlow {tf.__version__}. {BUILD}. "
            f"The loader said: {error.message}"
        ) from error
    if not has_cuda() and tf.config.list_physical_devices("GPU"):
        tf.get_logger().warning(
            "stf's op library was built without CUDA kernels: attention runs on the CPU, beside this machine's GPUs. "
            "%s on this machine.",
            BUILD,
        )
    return module


def has_cuda():
    """Whether the library that `load` loads has kernels for NVIDIA GPUs."""
    return bool(architectures())


def cpu_isa():
    """The instruction set that the CPU kernels run with here: "avx512", "avx2" or "generic".

    Raises:
        LibraryNotFoundError: see `load`.
    """
    load()
    name = ctypes.CDLL(str(kernels_path())).stf_attention_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


@functools.cache
def architectures():
    """The GPU architectures that the library has kernels for, as nvcc names them.

    Raises:
        LibraryNotFoundError: nothing says so, or nothing that can be read.
    """
    path = FOLDER / "built_for.json"
    try:
        return tuple(json.loads(path.read_text())["cuda"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LibraryNotFoundError(
            f"{path} should say what stf's op library was built for, and cannot be read: {error}. {BUILD}."
        ) from error


def _minor_version():
    return ".".join(tf.__version__.split(".")[:2])


def is_available() -> bool:
    """Whether the op library loads here."""
    try:
        load()
    except LibraryNotFoundError:
        return False
    return True
