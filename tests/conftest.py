"""What all tests share: two threads, a quiet TensorFlow, tests/paper_sets.py, property tests that repeat exactly."""

import importlib.util
import os
import pathlib
import sys

import pytest
from hypothesis import settings

# Before anything imports TensorFlow, and for the processes that tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")

sys.path.insert(0, str(pathlib.Path(__file__).parent))
settings.register_profile("stf", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("stf")


TESTED = pathlib.Path(importlib.util.find_spec("stf").origin).parent


def pytest_configure():
    """Refuses to test another stf than `make test` says."""
    asked = os.environ.get("STF_TESTED")
    if asked and not TESTED.is_relative_to(asked):
        raise pytest.UsageError(f"the stf in {asked} is to be tested, and the one in {TESTED} is imported")


def pytest_report_header():
    """Which stf is tested: the installed one, or the tree's."""
    return f"stf: {TESTED}"
