"""Builds the op library with Bazel and puts it where `stf.ops` looks for it.

    python custom_ops/build.py                    # TensorFlow must be installed for this Python
    python custom_ops/build.py --install-bazel    # first install Debian's bazel-bootstrap, if no Bazel is found

Needs no network: Bazel's rules are its own, and TensorFlow's headers and library are the wheel's.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = "//custom_ops:libstf_ops.so"
LIBRARY = ROOT / "stf" / "ops" / "libstf_ops.so"
BUILT_FOR = LIBRARY.with_name("built_for.json")
MISSING = (
    "No Bazel found. Install one of: `bazelisk` (any system), `bazel` 4 to 7, or on Debian and Ubuntu "
    "`apt-get install bazel-bootstrap`. Then run this again."
)


def find_bazel(install=False):
    """The command of Bazel; installs Debian's where that is asked for and possible."""
    # Debian's launcher `bazel` refuses any .bazelversion but its own; the program behind it is bazel-4.
    names = ("bazel-4", "bazel", "bazelisk")
    for name in names:
        if found := shutil.which(name):
            return found
    if install and shutil.which("apt-get"):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if not root or shutil.which("sudo"):
            subprocess.run([*root, "apt-get", "update", "-qq"], check=False)
            command = [*root, "apt-get", "install", "-y", "-qq", "bazel-bootstrap"]
            subprocess.run(command, check=False)
            if found := shutil.which("bazel-4"):
                return found
    sys.exit(MISSING)


def tensorflow():
    """Version, include folder and library folder of the installed TensorFlow, without importing it."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None:
        sys.exit("TensorFlow is not installed for this Python: pip install -r requirements.lock")
    folder = pathlib.Path(spec.origin).parent
    return importlib.metadata.version("tensorflow"), folder / "include", folder


def build(install_bazel=False):
    """Builds the library; returns its path and that of the file that says what it was built for."""
    bazel = find_bazel(install_bazel)
    version, include, lib = tensorflow()
    environment = {
        "STF_TENSORFLOW_INCLUDE": include,
        "STF_TENSORFLOW_LIB": lib,
        "STF_TENSORFLOW_DEFINES": "_GLIBCXX_USE_CXX11_ABI=1 EIGEN_MAX_ALIGN_BYTES=64",
    }
    command = [bazel, "build", TARGET]
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
