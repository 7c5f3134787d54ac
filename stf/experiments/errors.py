"""What a run refuses."""


class RunError(RuntimeError):
    """A run that cannot begin or go on; one line that names the path, the cause and what to do."""
