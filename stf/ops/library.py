"""Finds and loads the op library, once, when an op is first called."""

import ctypes
import functools
import json
import pathlib

import tensorflow as tf

FOLDER = pathlib.Path(__file__).resolve().parent
BUILD = "Build it with `make lib` in a checkout, or install stf with `pip install .`"


class LibraryNotFoundError(ImportError):
    """The op library is not there, or was built for another TensorFlow or without what is asked of it."""


def library_path():
    """Where the op library belongs, as a `pathlib.Path`."""
    return FOLDER / "libstf_ops.so"


@functools.cache
def load():
    """The module of the library's ops.

    Raises:
        LibraryNotFoundError: says what to do.
    """
    path = library_path()
    if not path.exists():
        raise LibraryNotFoundError(f"stf's op library is missing: no file {path}. {BUILD}.")
    version = built_for()["tensorflow"]
    if version != tf.__version__:
        raise LibraryNotFoundError(
            f"stf's op library {path} was built for TensorFlow {version}, and this is "
            f"TensorFlow {tf.__version__}. {BUILD}, or install tensorflow=={version}."
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


@functools.cache
def has_cuda():
    """Whether the library that `load` loads has kernels for NVIDIA GPUs."""
    return bool(built_for()["cuda"])


def cpu_isa():
    """The instruction set that the CPU kernels run with here: "avx512", "avx2" or "generic"."""
    load()
    name = ctypes.CDLL(str(library_path())).stf_ops_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


def built_for():
    """What the library was built for: the version of TensorFlow, the GPU architectures.

    Raises:
        LibraryNotFoundError: nothing says so, or nothing that can be read.
    """
    path = FOLDER / "built_for.json"
    try:
        return {"cuda": (), **json.loads(path.read_text())}
    except (OSError, ValueError) as error:
        raise LibraryNotFoundError(
            f"{path} should say what stf's op library was built for, and cannot be read: {error}. {BUILD}."
        ) from error


def is_available():
    """Whether the op library loads here."""
    try:
        load()
    except LibraryNotFoundError:
        return False
    return True
