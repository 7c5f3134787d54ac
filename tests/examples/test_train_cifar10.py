"""The example as a user runs it: whole, interrupted, resumed, and its TensorBoard in a browser."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLED = pathlib.Path(__file__).with_name("killed.py")
TINY = [
    "--num_blocks=1",
    "--batch_size=2",
    "--validation_images=2",
    "--test_images=2",
    "--samples=1",
    "--warmup_steps=2",
]


def command(run_dir, *flags):
    return [sys.executable, ROOT / "examples" / "train_cifar10.py", f"--run_dir={run_dir}", *TINY, *flags]


def environment(folder):
    """Where tensorflow-datasets finds nothing, and a network gives nothing: the photographs serve."""
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "NO_GCE_CHECK": "true", "TFDS_DATA_DIR": str(folder / "no_data")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that was killed without warning a step after its first checkpoint, and then resumed to the end."""
    folder = tmp_path_factory.mktemp("example") / "run"
    flags = ["--steps=6", "--epochs=3"]
    options = dict(capture_output=True, text=True, env=environment(folder.parent), timeout=300)
    python, *example = command(folder, *flags)
    killed = subprocess.run([python, KILLED, *example], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    resumed = subprocess.run(command(folder, *flags, "--resume"), **options)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    (folder / "output.txt").write_text(resumed.stdout)
    return folder


def test_photographs_are_said_to_be_no_cifar10_in_every_last_line(run_dir):
    lines = (run_dir / "output.txt").read_text().splitlines()
    assert any(line.startswith("NOT CIFAR-10") for line in lines)
    assert all("NOT CIFAR-10" in line for line in lines[-3:]), lines[-3:]


def test_a_folder_without_the_data_is_refused(tmp_path):
    flags = [f"--data_dir={tmp_path / 'typo'}"]
    done = subprocess.run(command(tmp_path / "run", *flags), capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("--data_dir: CIFAR-10 is not in ") and "typo" in last
    assert "Traceback" not in done.stderr


def test_resumed_run_goes_on_from_the_checkpoint(run_dir):
    resumed = (run_dir / "output.txt").read_text()
    assert re.search(r"resuming .* after step 2\n", resumed)
    assert re.findall(r"Epoch (\d)/3", resumed) == ["2", "3"]


def test_last_lines_say_what_came_out_and_where(run_dir):
    text = (run_dir / "output.txt").read_text()
    bits, entropy = map(float, re.search(r"test bits per dim.*: ([\d.]+) \(order-0 .*: ([\d.]+)\)", text).groups())
    assert 0 < bits < 12 and 0 < entropy <= 8
    for line in ("\ncheckpoint", ": tensorboard --logdir=", "samples: ", "completions: "):
        assert line in text
    assert (run_dir / "samples.png").stat().st_size > 500 and (run_dir / "completions.png").stat().st_size > 500


def browser():
    from selenium import webdriver

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert found and driver, "this test needs a browser: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1500,4000",
    ):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def test_tensorboard_page_shows_the_pictures(run_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            f"--logdir={run_dir / 'log'}",
            "--host=127.0.0.1",
            f"--port={port}",
            "--load_fast=false",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.time() + 90
        while time.time() < deadline:
            try:
                tags = urllib.request.urlopen(f"{url}/data/plugin/images/tags", timeout=5).read().decode()
                if all(tag in tags for tag in ("attention maps", "connectivity", "samples", "completions")):
                    break
            except OSError:
                pass
            time.sleep(0.5)
        page = browser()
        try:
            page.get(f"{url}/#images")
            script = """
                const found = [];
                const visit = root => { for (const e of root.querySelectorAll('*')) {
                    if (e.tagName === 'IMG' && e.naturalWidth > 20)
                        found.push([e.src, e.naturalWidth, e.naturalHeight]);
                    if (e.shadowRoot) visit(e.shadowRoot); } };
                visit(document); return found;"""
            images, deadline = [], time.time() + 90
            while time.time() < deadline:
                images = [image for image in page.execute_script(script) if "individualImage" in image[0]]
                if len(images) >= 4:
                    break
                time.sleep(0.5)
            page.save_screenshot(str(run_dir / "tensorboard.png"))
        finally:
            page.quit()
    finally:
        server.terminate()
        server.wait()
    assert len(images) >= 4, f"TensorBoard's page shows {images}"
    assert all(width > 20 and height > 20 for _, width, height in images)
