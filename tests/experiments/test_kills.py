"""Runs that are killed at random moments and resumed end in the bits of an undisturbed one."""

import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("kills.py")


@pytest.mark.parametrize(("count", "seed"), [(1, 1), pytest.param(100, 0, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(count, seed, tmp_path):
    command = [sys.executable, PROGRAM, tmp_path, str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{sum(found['kills'].values())} kills of {found['runs']} runs, in {found['seconds']:.0f} s: {found['kills']}"
    )
    assert sum(found["kills"].values()) == count
    assert not found["unlike"]
