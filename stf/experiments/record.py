"""What a run was started with, in a file beside its checkpoint."""

import json
import pathlib

from stf.experiments.errors import RunError

MISSING = object()


class Record:
    """`run.json` of a run's folder: its number of steps and its settings.

    Args:
        run_dir: the folder.
    """

    def __init__(self, run_dir):
        self.path = pathlib.Path(run_dir) / "run.json"

    def write(self, steps, settings):
        """Replaces the record. Settings are what `json` takes."""
        fresh = self.path.with_name("run.new.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps({"steps": steps, "settings": settings}, indent=1) + "\n")
            fresh.replace(self.path)
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {error}. Name another --run_dir.") from error

    def check(self, steps, settings):
        """Whether a run may go on with these.

        Returns:
            The steps that the run was to have; None where no record says it.

        Raises:
            RunError: fewer steps, or other settings than it was started with, where the record has them.
        """
        if not self.path.exists():
            return None
        try:
            record = json.loads(self.path.read_text())
            before, started = record["steps"], record["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.path} cannot be read ({error}); it says what the run was started with. Delete it to go on "
                "without that check."
            ) from error
        now = json.loads(json.dumps(settings))
        differences = [
            f"{name} was {_shown(started.get(name, MISSING))}, is {_shown(now.get(name, MISSING))}"
            for name in sorted({*started, *now})
            if started.get(name, MISSING) != now.get(name, MISSING)
        ]
        if steps < before:
            differences.append(f"steps were {before}, are {steps} (they may be raised)")
        if differences:
            raise RunError(
                f"The run in {self.path.parent} was started otherwise: {'; '.join(differences)}. "
                "Resume it with what it was started with, or name another --run_dir."
            )
        return before


def _shown(value):
    return "not set" if value is MISSING else repr(value)
