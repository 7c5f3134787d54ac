"""A run as a command."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app

from stf.callbacks import CheckpointError
from stf.experiments.errors import RunError


def start(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> None:
    """`absl.app.run` for a program whose `RunError`s and `CheckpointError`s are its last line, without a traceback."""

    def guarded(arguments):
        try:
            return main(arguments)
        except (RunError, CheckpointError) as error:
            sys.exit(f"{error}")
        except KeyboardInterrupt:
            sys.exit(130)

    app.run(guarded, argv)
