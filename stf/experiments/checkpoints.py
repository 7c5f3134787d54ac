"""Reading a run's checkpoint."""

import pathlib

import keras

from stf.experiments.errors import RunError


def load_checkpoint(path):
    """The model of a checkpoint; of the one before it, where the last cannot be read.

    Args:
        path: `.../checkpoint.keras`.

    Raises:
        RunError: neither can be read.
    """
    path = pathlib.Path(path)
    causes = []
    for candidate in (path, path.with_name(f"{path.stem}.previous.keras")):
        if not candidate.exists():
            continue
        try:
            model = keras.saving.load_model(candidate)
        except (
            Exception
        ) as error:  # whatever a file may hold: Keras raises ValueError, KeyError, OSError, zipfile's own
            causes.append(f"{candidate} is no whole checkpoint ({_first_line(error)})")
            continue
        if causes:
            print(f"{causes[0]}: going on from the one before it, {candidate}")
        return model
    raise RunError(
        f"{'; '.join(causes) or f'{path} is not there'}. Begin anew with --overwrite, or name another --run_dir."
    )


def _first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
