"""The text example: killed without warning and resumed, it ends in the same weights; then evaluated by a command."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

import stf

ROOT = pathlib.Path(__file__).parents[2]
KILLED = pathlib.Path(__file__).with_name("killed.py")
TEXT = pathlib.Path(stf.__file__).parent  # files that are surely there
ENVIRONMENT = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
FLAGS = [
    f"--path={TEXT}",
    "--num_blocks=1",
    "--batch_size=2",
    "--steps=6",
    "--epochs=3",
    "--warmup_steps=2",
    "--held_out_bytes=3000",
    "--sample=5",
]


def train(run_dir, *flags):
    return [sys.executable, ROOT / "examples" / "train_enwik8.py", f"--run_dir={run_dir}", *FLAGS, *flags]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was left alone, and one that was killed in its second epoch and resumed; what both printed."""
    folder = tmp_path_factory.mktemp("enwik8")
    options = dict(capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    whole = subprocess.run(train(folder / "whole"), **options)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    python, *example = train(folder / "killed")
    killed = subprocess.run([python, KILLED, *example], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    resumed = subprocess.run(train(folder / "killed", "--resume"), **options)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return folder, whole.stdout, resumed.stdout


def test_a_killed_and_resumed_run_ends_in_the_same_weights(runs):
    folder, whole, resumed = runs
    assert re.search(r"resuming .* after step 2\n", resumed) and "resuming" not in whole
    models = [keras.saving.load_model(folder / name / "checkpoint.keras") for name in ("whole", "killed")]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)
    last = [re.search(r"test bits per byte: ([\d.]+)", text).group(1) for text in (whole, resumed)]
    assert last[0] == last[1]


def test_last_lines_say_what_came_out_and_where(runs):
    folder, whole, _ = runs
    numbers = re.search(r"test bits per byte: ([\d.]+) .*order-0 entropy ([\d.]+), xz -9 ([\d.]+)", whole).groups()
    assert all(0 < float(number) < 12 for number in numbers)
    assert (folder / "whole" / "sample.txt").stat().st_size == 205
    assert "TensorBoard: tensorboard --logdir=" in whole


def evaluated(folder, *flags):
    """What evaluate.py's last line says of the run that was left alone."""
    checkpoint = f"--checkpoint={folder / 'whole' / 'checkpoint.keras'}"
    command = [sys.executable, ROOT / "examples" / "evaluate.py", checkpoint, "--data=text", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_evaluate_gives_one_line_of_json_and_every_bytes_loss(runs):
    folder = runs[0]
    result = evaluated(
        folder,
        f"--path={TEXT}",
        "--limit=2500",
        f"--losses={folder / 'losses.npy'}",
    )
    losses = np.load(folder / "losses.npy")
    assert result["bytes"] == len(losses) == 2500
    assert result["bits_per_byte"] == pytest.approx(losses.mean() / np.log(2), rel=1e-5)


@pytest.mark.slow
def test_evaluate_with_a_model_that_learns_as_it_reads(runs):
    still, learning = (
        evaluated(runs[0], f"--path={TEXT}", "--limit=2500", "--batch_size=1", *flags)
        for flags in ((), ("--dynamic=0.001",))
    )
    assert learning["dynamic"] == 0.001 and learning["bytes"] == still["bytes"]
    assert learning["bits_per_byte"] < still["bits_per_byte"]


def test_a_second_run_in_the_same_folder_is_refused_in_one_line(runs):
    done = subprocess.run(train(runs[0] / "whole"), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert str(runs[0] / "whole") in last and "--resume" in last and "--overwrite" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_evaluate_takes_a_file_whole(runs):
    folder = runs[0]
    result = evaluated(
        folder,
        "--split=all",
        f"--path={TEXT / 'version.py'}",
    )
    assert result["bytes"] == (TEXT / "version.py").stat().st_size
