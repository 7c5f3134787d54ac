"""A run as a command."""

import sys

from absl import app

from stf.callbacks import CheckpointError
from stf.experiments.errors import RunError

SETTINGS = ("preset", "num_blocks", "batch_size", "learning_rate", "warmup_steps", "average", "policy", "seed")


def start(main):
    """`absl.app.run` for a program whose `RunError`s and `CheckpointError`s are its last line, without a traceback."""

    def guarded(arguments):
        try:
            return main(arguments)
        except (RunError, CheckpointError) as error:
            sys.exit(f"{error}")
        except KeyboardInterrupt:
            sys.exit(130)

    app.run(guarded)


def settings(flags, data):
    """The values of a program's flags that must be the same when its run goes on, and what its data are."""
    return {name: flags[name].value for name in SETTINGS} | {"data": data}
