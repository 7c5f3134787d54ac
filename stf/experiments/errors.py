"""What a run refuses."""


class RunError(RuntimeError):
    """A run that cannot begin, go on or be written; one line that names the path, the cause and what to do."""
