"""Packages that only some of stf needs: `pip install 'stf[...]'` brings them."""

import importlib

EXTRAS = {
    "PIL": "images",
    "skimage": "data",
    "soundfile": "audio",
    "soxr": "audio",
    "tensorboard": "tensorboard",
    "tensorflow_datasets": "data",
    "tqdm": "data",
}


def needed(name):
    """The module of a name.

    Raises:
        ImportError: it is not installed; says which extra of stf brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # it is there, and lacks something itself
            raise
        extra = EXTRAS[name.partition(".")[0]]
        raise ImportError(f"{name} is needed here and not installed: pip install 'stf[{extra}]'") from error
