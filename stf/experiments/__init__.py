"""Runs that leave a record, and that can be stopped and taken up again."""

from stf.experiments.command import settings, start
from stf.experiments.errors import RunError
from stf.experiments.run import run

__all__ = ["RunError", "run", "settings", "start"]
