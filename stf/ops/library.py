"""Finds and loads the op library, once, when an op is first called."""

import functools
import json
import pathlib

import tensorflow as tf

FOLDER = pathlib.Path(__file__).resolve().parent
BUILD = "Build it with `make lib` in a checkout, or install stf with `pip install .`"


class LibraryNotFoundError(ImportError):
    """The op library is not there, or was built for another TensorFlow."""


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
    built_for = FOLDER / "built_for.json"
    if built_for.exists():
        version = json.loads(built_for.read_text())["tensorflow"]
        if version != tf.__version__:
            raise LibraryNotFoundError(
                f"stf's op library {path} was built for TensorFlow {version}, and this is "
                f"TensorFlow {tf.__version__}. {BUILD}, or install tensorflow=={version}."
            )
    try:
        return tf.load_op_library(str(path))
    except tf.errors.NotFoundError as error:
        raise LibraryNotFoundError(
            f"stf's op library {path} does not load with TensorFlow {tf.__version__}. {BUILD}. "
            f"The loader said: {error.message}"
        ) from error


def is_available():
    """Whether the op library loads here."""
    try:
        load()
    except LibraryNotFoundError:
        return False
    return True
