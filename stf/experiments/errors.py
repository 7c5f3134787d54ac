"""What a run refuses."""

import contextlib
from collections.abc import Iterator


class RunError(RuntimeError):
    """A run that cannot begin or go on; one line that names the path, the cause and what to do."""


@contextlib.contextmanager
def blamed_on(flag: str) -> Iterator[None]:
    """Makes what reading data says of a file, or of a number that does not fit, one line that names the flag."""
    try:
        yield
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"{flag}: {lines[0]}") from error
