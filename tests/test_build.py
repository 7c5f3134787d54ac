"""What is built and installed: the library beside stf, the pins, the wheel, the command."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import stf_command

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPS = ROOT / "stf" / "ops"


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    lines = (ROOT / "requirements.lock").read_text().split()
    return {normalized(name): version for name, version in (line.split("==") for line in lines)}


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
    )


def test_environment_is_the_locked_one():
    versions = {name: importlib.metadata.version(name) for name in locked()}
    assert versions == locked()


def test_lock_holds_all_that_stf_needs():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins, pending, seen = locked(), list(project["dependencies"]), set()
    for extra in project["optional-dependencies"].values():
        pending += extra
    while pending:
        requirement = Requirement(pending.pop())
        name = normalized(requirement.name)
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras}
        ):
            continue
        assert name in pins, f"{requirement} is not in requirements.lock"
        assert requirement.specifier.contains(pins[name], prereleases=True), requirement
        if name not in seen:
            seen.add(name)
            pending += importlib.metadata.requires(name) or []


def test_library_says_what_it_was_built_for():
    built_for = json.loads((OPS / "built_for.json").read_text())
    assert built_for.keys() == {"tensorflow", "cuda"}
    assert built_for["tensorflow"] == importlib.metadata.version("tensorflow")


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("", None, ()),
        ("", "8.6\n", ("86",)),
        ("", "9.0\n8.0\n9.0\n", ("80", "90a")),
        ("", "No devices were found\n", ()),
        ("none", "9.0\n", ()),
        ("all", None, ("80", "90a", "100")),
        ("80,90a", None, ("80", "90a")),
    ],
)
def test_the_library_is_built_for_what_the_machine_can_run(asked, gpus, expected, tmp_path, monkeypatch):
    if gpus is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("STF_CUDA_ARCHITECTURES", asked)
    assert op_library().architectures() == expected


def test_architectures_that_are_none_are_refused(monkeypatch):
    monkeypatch.setenv("STF_CUDA_ARCHITECTURES", "hopper")
    with pytest.raises(SystemExit, match="Received: hopper"):
        op_library().architectures()


def test_an_old_nvcc_is_not_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert op_library().cuda() != str(tmp_path)
    assert f"{nvcc} is not of CUDA 12.5 or later" in capsys.readouterr().out


def op_library():
    """custom_ops/build.py as a module."""
    spec = importlib.util.spec_from_file_location("op_library", ROOT / "custom_ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_know_nothing_of_tensorflow():
    sources = [path for path in (ROOT / "custom_ops" / "attention").rglob("*") if path.suffix in {".h", ".cc", ".cu"}]
    assert sources
    for path in sources:
        includes = re.findall(r"#include\s+[<\"](\S+)[>\"]", path.read_text())
        assert not [name for name in includes if "tensorflow" in name or name.startswith("xla/")], path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "wheel", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index")
    built = run(*pip, "--wheel-dir", folder, ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_is_for_this_platform(wheel):
    assert re.fullmatch(r"stf-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"stf/ops/libstf_ops.so", "stf/ops/built_for.json", "stf/patterns/__init__.py"} <= set(names)
    assert {f"stf/examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stf", "stf_command.py"}


def test_the_command_runs_without_the_source_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}

    def command(*arguments):
        return run("-m", "stf_command", *arguments, cwd=tmp_path, **environment)

    assert command("version").stdout.split() == [wheel.name.split("-")[1]]
    assert command("presets").stdout.startswith("preset")
    helped = command("train", "cifar10", "--help")
    assert "--resume" in helped.stdout and "--data_dir" in helped.stdout, helped.stderr
    made = command(
        "train",
        "cifar10",
        "--steps=2",
        "--batch_size=2",
        "--validation_images=2",
        "--test_images=2",
        "--samples=1",
        f"--run_dir={tmp_path / 'run'}",
        f"--data_dir={tmp_path / 'nothing'}",
    )
    assert made.returncode == 1 and "--data_dir" in made.stderr
    assert str(ROOT) not in helped.stdout + made.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [((), "stf train"), (("fly",), "Received: fly"), (("train", "x"), "Received: x")]
)
def test_what_the_command_does_not_know_is_said(arguments, said, capsys):
    code = stf_command.main(arguments)
    spoken = capsys.readouterr()
    assert said in spoken.out + spoken.err and code == (2 if arguments else 0)


USE_OP = """
import numpy as np, stf
x = np.random.default_rng(0).normal(size=(1, 40, 2, 8)).astype("float32")
pattern = stf.patterns.Local(7) | stf.patterns.Strided(7)
out, reference = (f(x, x, x, pattern) for f in (stf.ops.attention, stf.ops.reference_attention))
np.testing.assert_allclose(out, reference, atol=1e-5)
print(stf.__file__, stf.ops.library_path())
"""


def test_wheel_works_without_the_source_tree(wheel, tmp_path):
    """Unpacked elsewhere and put first on the path; the editable installation's folder must not be used."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    used = run("-c", USE_OP, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert used.returncode == 0, used.stderr
    assert str(tmp_path) in used.stdout and str(ROOT) not in used.stdout


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda ops: (ops / "libstf_ops.so").unlink(), "op library is missing"),
        (
            lambda ops: (ops / "built_for.json").write_text('{"tensorflow": "2.20.0"}'),
            "was built for TensorFlow 2.20.0",
        ),
        (lambda ops: (ops / "libstf_ops.so").write_bytes(b"no library"), "does not load"),
        (lambda ops: (ops / "built_for.json").write_text(""), "cannot be read"),
    ],
    ids=["missing", "other TensorFlow", "broken", "emptied"],
)
def test_import_works_without_the_library_and_the_op_says_what_to_do(wheel, tmp_path, break_it, said):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    break_it(tmp_path / "stf" / "ops")
    program = "import stf; print('imported', stf.ops.is_available())\n" + USE_OP
    used = run("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "imported False" in used.stdout, used.stderr
    assert "LibraryNotFoundError" in used.stderr and said in used.stderr
    assert "pip install ." in used.stderr


def test_version_is_the_same_everywhere():
    import stf

    assert stf.__version__ == importlib.metadata.version("stf")
    assert f"## {stf.__version__}" in (ROOT / "CHANGELOG.md").read_text()
