"""What all tests share: two threads, a quiet TensorFlow, tests/paper_sets.py, property tests that repeat exactly."""

import os
import pathlib
import sys

from hypothesis import settings

# Before anything imports TensorFlow, and for the processes that tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")

sys.path.insert(0, str(pathlib.Path(__file__).parent))
settings.register_profile("stf", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("stf")
