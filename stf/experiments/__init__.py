"""Runs that leave a record, and that can be stopped and taken up again."""

from stf.experiments import flags
from stf.experiments.cluster import distributed, is_first, make_strategy
from stf.experiments.command import start
from stf.experiments.errors import RunError, blamed_on
from stf.experiments.run import run

__all__ = ["RunError", "blamed_on", "distributed", "flags", "is_first", "make_strategy", "run", "start"]
