"""The examples for recordings and for folders of images, and samples of what they trained, as a user runs them."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import stf

ROOT = pathlib.Path(__file__).parents[2]
COMMON = ["--num_blocks=1", "--batch_size=1", "--steps=2", "--epochs=1", "--warmup_steps=1"]


def example(name, *flags):
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, flags)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    import soundfile

    folder = tmp_path_factory.mktemp("audio")
    time = np.arange(9000) / 12_000
    for name, pitch in (("a", 220), ("b", 330), ("c", 440)):
        soundfile.write(folder / f"{name}.flac", 0.5 * np.sin(2 * np.pi * pitch * time), 12_000)
    run_dir = folder / "run"
    said = example(
        "train_audio", f"--path={folder}", f"--run_dir={run_dir}", "--sample=40", "--held_out_bytes=5000", *COMMON
    )
    return run_dir, said


def test_audio_example(audio):
    import soundfile

    run_dir, said = audio
    assert "test bits per byte: " in said and "order-0 entropy of the same 5,000 bytes" in said
    wave, rate = soundfile.read(run_dir / "sample.wav")
    assert len(wave) == 40 and rate == 12_000


def test_generate_writes_recordings_that_begin_as_asked(audio):
    from stf.data.audio import encode, read

    run_dir, _ = audio
    prefix = run_dir.parent / "a.flac"
    output = run_dir / "more.wav"
    said = example(
        "generate",
        f"--checkpoint={run_dir / 'checkpoint.keras'}",
        f"--output={output}",
        f"--prefix={prefix}",
        "--prefix_length=30",
        "--length=50",
        "--count=2",
        "--top_p=0.9",
    )
    assert said.count("written:") == 2
    for index in range(2):
        drawn = encode(read(run_dir / f"more_{index}.wav"))
        assert len(drawn) == 50
        assert np.abs(drawn[:30].astype(int) - encode(read(prefix))[:30]).max() <= 1


def test_images_example(tmp_path):
    import skimage.data

    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(skimage.data, name)()).resize((80, 70)).save(tmp_path / f"{name}.png")
    said = example("train_imagenet64", f"--folder={tmp_path}", f"--run_dir={tmp_path / 'run'}", "--samples=0", *COMMON)
    assert "1 to train, 1 to validate, 1 to test" in said
    assert "validation bits per dim: " in said and "(12,288 bytes)" in said


@pytest.mark.parametrize(
    ("name", "flag"), [("train_audio", "--path"), ("train_enwik8", "--path"), ("train_imagenet64", "--folder")]
)
def test_a_wrong_path_is_one_line(name, flag, tmp_path):
    command = [
        sys.executable,
        ROOT / "examples" / f"{name}.py",
        f"{flag}={tmp_path / 'typo'}",
        f"--run_dir={tmp_path}/r",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith(f"{flag}: ") and "typo" in last and not (tmp_path / "r").exists()


def test_attention_maps_of_a_checkpoint(tmp_path):
    import skimage.data

    model = stf.models.SparseTransformer.from_preset("imagenet64-small", num_blocks=1)
    model.save(tmp_path / "model.keras")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "image.png")
    flags = [f"--checkpoint={tmp_path / 'model.keras'}", f"--image={tmp_path / 'image.png'}"]
    said = example("attention_maps", *flags, f"--output={tmp_path / 'maps.png'}")
    assert f"written: {tmp_path / 'maps.png'}" in said
    assert Image.open(tmp_path / "maps.png").size[0] > 200


def generate(folder, *arguments, **options):
    command = [sys.executable, ROOT / "examples" / "generate.py", f"--checkpoint={folder / 'model.keras'}"]
    return subprocess.Popen(
        [*command, f"--output={folder / 'out'}", "--count=2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_an_interrupted_generation_goes_on_to_the_same_samples(tmp_path):
    model = stf.models.SparseTransformer(
        200_000, (500, 400), [stf.patterns.Local(8)], num_blocks=1, num_heads=1, model_dim=8, seed=1
    )
    model.logits.kernel.assign(np.random.default_rng(1).normal(size=(8, 256)))
    model.save(tmp_path / "model.keras")
    run = generate(tmp_path, "--seed=3")
    while "token" not in run.stdout.read(200):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and "go on with --resume" in said and "Traceback" not in said
    with np.load(tmp_path / "out.partial.npz") as kept:
        drawn = kept["tokens"]
    assert 0 < drawn.shape[1] < 200_000 and not (tmp_path / "out").exists()
    end = drawn.shape[1] + 300
    whole = model.generate(2, seed=3, length=end, verbose=0)
    np.testing.assert_array_equal(whole[:, : drawn.shape[1]], drawn)
    with np.load(tmp_path / "out.partial.npz") as kept:  # the rest of two hundred thousand would take long
        np.savez(tmp_path / "out.partial.npz", **{**kept, "length": str(end)})
    done = generate(tmp_path, "--seed=3", f"--length={end}", "--resume")
    assert "written:" in done.communicate(timeout=120)[0]
    found = np.frombuffer((tmp_path / "out").read_bytes(), np.uint8).reshape(2, end)
    np.testing.assert_array_equal(found, whole)
    assert not (tmp_path / "out.partial.npz").exists()


@pytest.mark.slow
def test_generation_writes_over_nothing_and_goes_on_with_its_own(tmp_path):
    stf.models.SparseTransformer(64, (8, 8), [stf.patterns.Local(8)], 1, 1, 8).save(tmp_path / "model.keras")
    kept = dict(checkpoint=tmp_path / "model.keras", count=2, condition=None, prefix=None, prefix_length=0, length=0)
    kept |= dict(temperature=1.0, top_k=None, top_p=None, seed=3)
    tokens = np.zeros((2, 5), np.int32)
    np.savez(tmp_path / "out.partial.npz", tokens=tokens, **{name: str(value) for name, value in kept.items()})
    assert "--resume goes on with it" in generate(tmp_path, "--seed=3").communicate(timeout=120)[1]
    assert "--seed must be 3" in generate(tmp_path, "--seed=4", "--resume").communicate(timeout=120)[1]
    assert "written:" in generate(tmp_path, "--seed=3", "--resume").communicate(timeout=120)[0]
    written = (tmp_path / "out").read_bytes()
    assert "--overwrite writes over it" in generate(tmp_path).communicate(timeout=120)[1]
    assert (tmp_path / "out").read_bytes() == written and written[:5] == bytes(5)


@pytest.mark.slow
def test_attention_maps_of_a_recording(audio, tmp_path):
    run_dir, _ = audio
    flags = [f"--checkpoint={run_dir / 'checkpoint.keras'}", f"--audio={run_dir.parent / 'a.flac'}", "--head=1"]
    example("attention_maps", *flags, f"--output={tmp_path / 'maps.png'}")
    assert Image.open(tmp_path / "maps.png").size[0] > 200


FINETUNE = """
import runpy, sys
import numpy as np
import stf

draw = np.random.default_rng(0)
labels = [draw.integers(0, 10, count) for count in (60, 20, 30)]
images = [(25 * part[:, None] + draw.integers(0, 9, (len(part), 3072))).astype(np.uint8) for part in labels]
stf.data.cifar10.load = lambda *_: stf.data.Splits(*images, "images as bright as their class")
stf.data.cifar10.labels = lambda *_: labels
program, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.slow
def test_fine_tuning_names_what_can_be_seen(tmp_path):
    model = stf.models.SparseTransformer.from_preset("cifar10-small", num_blocks=2, seed=0)
    model.save(tmp_path / "model.keras")
    command = [sys.executable, "-c", FINETUNE, ROOT / "examples" / "finetune_cifar10.py", "--batch_size=10"]
    command += [f"--checkpoint={tmp_path / 'model.keras'}", "--epochs=1", "--from_scratch", "--learning_rate=0.001"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["features"]["test"] > 0.8 and said["images"] == 60  # one of ten is chance
    assert said.keys() == {"checkpoint", "images", "features", "from_scratch", "fine_tuned"}
