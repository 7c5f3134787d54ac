"""A run as a command."""

import sys

from absl import app

from stf.experiments.errors import RunError


def start(main):
    """`absl.app.run` for a program whose `RunError`s are its last line, without a traceback."""

    def guarded(arguments):
        try:
            return main(arguments)
        except RunError as error:
            sys.exit(f"{error}")
        except KeyboardInterrupt:
            sys.exit(130)

    app.run(guarded)
