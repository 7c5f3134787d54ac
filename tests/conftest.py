"""What all tests share: the path to tests/paper_sets.py, and property tests that repeat exactly."""

import pathlib
import sys

from hypothesis import settings

sys.path.insert(0, str(pathlib.Path(__file__).parent))
settings.register_profile("stf", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("stf")
