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
from stf.ops import library

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPS = ROOT / "stf" / "ops"
FACE = library.library_path().name  # of the installed TensorFlow


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
        if name == "stf":  # an extra of several
            assert requirement.extras <= project["optional-dependencies"].keys()
            continue
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
    assert json.loads((OPS / "built_for.json").read_text()).keys() == {"cuda"}
    assert ".".join(importlib.metadata.version("tensorflow").split(".")[:2]) in library.tensorflows()


def test_a_tensorflow_that_it_was_not_built_for_is_refused(monkeypatch):
    built = ", ".join(library.tensorflows())
    monkeypatch.setattr(library.tf, "__version__", "2.31.4")
    library.load.cache_clear()
    with pytest.raises(library.LibraryNotFoundError, match=f"is for TensorFlow {built}, and this is TensorFlow 2.31.4"):
        library.load()


def test_the_faces_are_for_the_tensorflows_that_pip_may_install():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["cuda"])]
    for requirement in (each for each in asked if each.name == "tensorflow"):
        allowed = [minor for minor in range(60) if requirement.specifier.contains(f"2.{minor}.9")]
        assert [f"2.{minor}" for minor in allowed] == list(op_library().TENSORFLOWS)
        assert all(map(requirement.specifier.contains, op_library().TENSORFLOWS.values()))


# What manylinux_2_28 has, the oldest system that the wheel is for.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.mark.parametrize("name", ["libstf_kernels.so", FACE])
def test_the_library_loads_on_older_systems(name):
    said = subprocess.run(["objdump", "-T", OPS / name], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)\s+(\S+)", said)
    assert {"GLIBC", "GCC"} <= {kind for kind, *_ in needed}
    for kind, version, symbol in needed:
        assert tuple(map(int, version.split("."))) <= NEWEST[kind], f"{symbol} of {kind} {version}"


def test_the_face_runs_on_every_x86_64():
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", OPS / FACE], capture_output=True, text=True).stdout
    assert re.search(r"\tmov\w* ", code) and not re.search(r"\tv\w+ |%[yz]mm", code), "it has AVX"


def test_the_kernels_show_their_entry_points_alone():
    said = subprocess.run(["nm", "-D", "--defined-only", OPS / "libstf_kernels.so"], capture_output=True, text=True)
    shown = {line.split()[-1] for line in said.stdout.splitlines()}
    headers = (ROOT / "custom_ops").glob("*/c*/*.h")
    declared = {name for path in headers for name in re.findall(r"\b(stf_[a-z_]+)\((?!\*)", path.read_text())}
    cpu = {name for name in declared if name.startswith("stf_attention_cpu_")}
    assert len(cpu) == 3 and cpu <= shown <= declared, shown - declared
    if library.has_cuda():
        assert shown == declared


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("", None, ()),
        ("", "8.6\n", ("86",)),
        ("", "9.0\n8.0\n9.0\n", ("80", "90a")),
        ("", "No devices were found\n", ()),
        ("none", "9.0\n", ()),
        ("all", None, ("80", "90a", "100", "120")),
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


def test_tensorflows_that_are_none_are_refused(monkeypatch):
    monkeypatch.setenv("STF_TENSORFLOWS", "2.21")
    with pytest.raises(SystemExit, match="Received: 2.21"):
        op_library().tensorflows()


def test_of_a_downloaded_wheel_there_is_what_is_asked_for(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "headers-1.0-py3-none-any.whl", "w") as wheel:
        for name in ("headers/include/a.h", "headers/lib.so", "headers/other.py"):
            wheel.writestr(name, name)
        wheel.writestr("headers-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: headers\nVersion: 1.0\n")
        wheel.writestr("headers-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    module = op_library()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = module.unpacked("headers", "1.0", "headers/", ("include/", "lib.so"))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == ["include/a.h", "lib.so"]
    (tmp_path / "headers-1.0-py3-none-any.whl").unlink()
    assert module.unpacked("headers", "1.0", "headers/", ("include/", "lib.so")) == folder
    with pytest.raises(SystemExit, match="did not download headers==2.0"):
        module.unpacked("headers", "2.0", "headers/", ())


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
    assert {"stf/ops/libstf_kernels.so", f"stf/ops/{FACE}", "stf/ops/built_for.json"} <= set(names)
    assert sum(name.endswith(".so") for name in names) == 2 and "stf/patterns/__init__.py" in names
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
        (lambda ops: (ops / FACE).unlink(), "op library is missing"),
        (lambda ops: (ops / FACE).rename(ops / "libstf_ops_2_18.so"), "is for TensorFlow 2.18, and this is"),
        (lambda ops: (ops / FACE).write_bytes(b"no library"), "does not load"),
        (lambda ops: (ops / "libstf_kernels.so").unlink(), "does not load"),
        (lambda ops: (ops / "built_for.json").write_text(""), "cannot be read"),
    ],
    ids=["missing", "other TensorFlow", "broken", "kernels missing", "emptied"],
)
def test_import_works_without_the_library_and_the_op_says_what_to_do(wheel, tmp_path, break_it, said):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    break_it(tmp_path / "stf" / "ops")
    program = "import stf; print('imported', stf.ops.is_available())\n" + USE_OP
    used = run("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "imported False" in used.stdout, used.stderr
    assert "LibraryNotFoundError" in used.stderr and said in used.stderr
    assert "pip install " in used.stderr


@pytest.fixture(scope="module")
def wheel_for_all(tmp_path_factory):
    """The wheel as `make wheel` packs it, without kernels for GPUs, which take half an hour."""
    folder = tmp_path_factory.mktemp("wheel_for_all")
    environment = os.environ | {"STF_CUDA_ARCHITECTURES": "none"}
    before = {path: path.read_bytes() for path in [*OPS.glob("libstf_*.so"), OPS / "built_for.json"]}
    made = subprocess.run(
        ["make", "wheel", f"DIST={folder}"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    for path in OPS.glob("libstf_*.so"):  # it was built in this tree, whose library may be for its GPU
        path.unlink()
    for path, content in before.items():
        op_library().replace(path, content)
    assert made.returncode == 0, made.stdout + made.stderr
    (found,) = folder.glob("*.whl")
    return found


FIT = """
import numpy as np, stf, tensorflow as tf
sequences = np.random.default_rng(0).integers(0, 256, (16, 64), "uint8")
losses = []
for jit_compile in (True, False):
    model = stf.models.SparseTransformer(
        length=64,
        position_shape=(8, 8),
        patterns=[stf.patterns.Local(8), stf.patterns.Fixed(8, 2)],
        num_blocks=2,
        num_heads=2,
        model_dim=32,
        seed=0,
    )
    metrics = [stf.training.BitsPerDim()]
    optimizer, loss = stf.training.optimizer(0.003), stf.training.cross_entropy()
    model.compile(optimizer, loss, metrics=metrics, jit_compile=jit_compile)
    fitted = model.fit(stf.data.batches(sequences, batch_size=4, seed=0), steps_per_epoch=4, verbose=0)
    losses.append(fitted.history["loss"])
    assert model.generate(prefix=sequences[:1, :60], verbose=0).shape == (1, 64)
np.testing.assert_allclose(*losses, rtol=1e-4)
print("fitted with", tf.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tensorflow", ["2.19.1", "2.20.0", "2.21.0"])
def test_one_wheel_is_for_every_tensorflow(wheel_for_all, tensorflow, tmp_path):
    assert re.fullmatch(r"stf-[\d.]+-py3-none-manylinux_2_28_x86_64\.whl", wheel_for_all.name)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    for name in ("PYTHONPATH", "PYTHONSAFEPATH", "STF_TESTED"):
        environment.pop(name, None)

    def call(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(sys.executable, "-m", "venv", "venv")
    python = tmp_path / "venv" / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", wheel_for_all, f"tensorflow=={tensorflow}")
    call(python, "-m", "pip", "check")
    said = call(python, "-m", "stf.doctor")
    assert f"TensorFlow:         {tensorflow}" in said and "all is well" in said
    assert f"fitted with {tensorflow}" in call(python, "-c", FIT)


@pytest.mark.slow
def test_the_source_archive_builds_from_its_own_files(tmp_path):
    made = run("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})", cwd=ROOT)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("stf-*.tar.gz")
    pip = ("-m", "pip", "wheel", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index")
    built = run(*pip, "--wheel-dir", tmp_path, archive, cwd=tmp_path, STF_CUDA_ARCHITECTURES="none")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert {"stf/ops/libstf_kernels.so", f"stf/ops/{FACE}"} <= set(zipfile.ZipFile(wheel).namelist())


def test_version_is_the_same_everywhere():
    import stf

    assert stf.__version__ == importlib.metadata.version("stf")
    assert f"## {stf.__version__}" in (ROOT / "CHANGELOG.md").read_text()
