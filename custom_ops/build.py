"""Builds the op library with Bazel and puts it where `stf.ops` looks for it.

    python custom_ops/build.py                    # TensorFlow must be installed for this Python
    python custom_ops/build.py --install-bazel    # first install Debian's bazel-bootstrap, if no Bazel is found

With Debian's Bazel it needs no network: the rules are Bazel's own, TensorFlow's headers and library are the wheel's.
Where nvcc is found (in $CUDA_HOME, on the PATH or in /usr/local/cuda) the library also has the GPU's kernels, for the
architectures of $STF_CUDA_ARCHITECTURES (80,90a,100 unless set; 86 and 89 run 80's); STF_CUDA=off leaves them out.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = "//custom_ops:libstf_ops.so"
LIBRARY = ROOT / "stf" / "ops" / "libstf_ops.so"
BUILT_FOR = LIBRARY.with_name("built_for.json")
VERSIONS = range(4, 8)  # 8 and later read no WORKSPACE unless told to, and have no C++ rules of their own
DEBIAN = "bazel-4"  # Debian's launcher `bazel` refuses any .bazelversion but its own; this is the program behind it
MISSING = (
    "No Bazel from 4 to 7 found. Install one of: `bazelisk` (any system), `bazel`, or on Debian and Ubuntu "
    "`apt-get install bazel-bootstrap`. Then run this again."
)


def major_version(bazel):
    """The major version of a Bazel command; None where it does not run."""
    if pathlib.Path(bazel).name == DEBIAN:
        return 4  # says "no_version" of itself
    said = subprocess.run([bazel, "--version"], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^bazel (\d+)\.", said.stdout, re.MULTILINE)
    return int(found[1]) if found and said.returncode == 0 else None


def find_bazel(install=False):
    """A Bazel that can build this, and its major version; installs Debian's where that is asked for and possible."""
    for name in (DEBIAN, "bazel", "bazelisk"):
        if (path := shutil.which(name)) and (version := major_version(path)) in VERSIONS:
            return path, version
    if install and subprocess.run([ROOT / "third_party" / "debian" / "install.sh", "bazel-bootstrap"]).returncode == 0:
        return find_bazel()
    sys.exit(MISSING)


def flags_for(version):
    """Flags that one major version of Bazel needs and another may not know."""
    if version < 6:
        # Would be downloaded; the stand-ins hand out Bazel's own rules.
        stand_ins = ("rules_cc", "rules_java")
        return [f"--override_repository={name}={ROOT / 'third_party' / name}" for name in stand_ins]
    return ["--noenable_bzlmod"] if version >= 7 else []


def tensorflow():
    """Version and folder of the installed TensorFlow, without importing it."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None:
        sys.exit("TensorFlow is not installed for this Python: pip install -r requirements.lock")
    return importlib.metadata.version("tensorflow"), pathlib.Path(spec.origin).parent


def cuda():
    """The folder of a CUDA toolkit, or an empty string."""
    if os.environ.get("STF_CUDA") == "off":
        return ""
    named = pathlib.Path(os.environ.get("CUDA_HOME", "/nowhere"), "bin", "nvcc")
    found = [str(named), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(None, found):
        if not pathlib.Path(nvcc).exists():
            continue
        # The program on the PATH may be a script: nvcc itself knows where it lives.
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        folder = pathlib.Path(top[1].strip()).resolve() if top else pathlib.Path(nvcc).resolve().parent.parent
        if (folder / "lib64" / "libcudart_static.a").exists():
            return str(folder)
    return ""


def build(install_bazel=False):
    """Builds the library; returns its path and that of the file that says what it was built for."""
    bazel, bazel_version = find_bazel(install_bazel)
    version, folder = tensorflow()
    environment = {
        "STF_TENSORFLOW_INCLUDE": folder / "include",
        "STF_TENSORFLOW_LIB": folder,
        # What tf.sysconfig.get_compile_flags() says of TensorFlow 2.21's wheel, and what its build aligned Eigen to.
        "STF_TENSORFLOW_DEFINES": "_GLIBCXX_USE_CXX11_ABI=1 EIGEN_MAX_ALIGN_BYTES=64",
        "STF_CUDA": cuda(),
        "STF_CUDA_ARCHITECTURES": os.environ.get("STF_CUDA_ARCHITECTURES") or "80,90a,100",
    }
    if not environment["STF_CUDA"]:
        print("no nvcc found: building the CPU's kernels alone", flush=True)
    command = [bazel, "--max_idle_secs=60", "build", TARGET, *flags_for(bazel_version)]
    command += [f"--repo_env={name}={value}" for name, value in environment.items()]
    if os.environ.get("STF_BAZEL_OUTPUT"):
        command.insert(1, f"--output_user_root={os.environ['STF_BAZEL_OUTPUT']}")
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        sys.exit(f"Bazel ended with status {status}: {' '.join(map(str, command))}")
    # A new file under a new name, then renamed: a process that has the old one mapped keeps it.
    fresh = LIBRARY.with_suffix(".so.new")
    shutil.copyfile(ROOT / "bazel-bin" / "custom_ops" / "libstf_ops.so", fresh)
    fresh.chmod(0o755)
    fresh.replace(LIBRARY)
    BUILT_FOR.write_text(json.dumps({"tensorflow": version}) + "\n")
    return LIBRARY, BUILT_FOR


if __name__ == "__main__":
    print("built", build("--install-bazel" in sys.argv[1:])[0].relative_to(ROOT))
