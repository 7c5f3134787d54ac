"""Builds the op library with Bazel and puts it where `stf.ops` looks for it.

    python custom_ops/build.py                    # TensorFlow must be installed for this Python
    python custom_ops/build.py --install-bazel    # first install Debian's bazel-bootstrap, if no Bazel is found
    python custom_ops/build.py --check-cuda       # compile a part of the CUDA kernels, where nvcc is, and keep nothing

With Debian's Bazel it needs no network: the rules are Bazel's own, TensorFlow's headers and library are the wheel's.
The library has the kernels that this machine can run: the CPU's, and those of the architectures of its GPUs, which nvcc
compiles (of $CUDA_HOME, on the PATH or in /usr/local/cuda). $STF_CUDA_ARCHITECTURES says otherwise: "none", "all", or
names such as 80,90a (8.6 and 8.9 run 80's).
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
ALL_ARCHITECTURES = ("80", "90a", "100")
# A part that holds every template of the kernels: bfloat16 at depths 64 and 128, float32 at 256, which has passes of
# its own, and all that is not a kernel.
CUDA_SAMPLE = (
    "//custom_ops:attention_cuda_1_2",
    "//custom_ops:attention_cuda_0_4",
    "//custom_ops:attention_cuda_host",
    "//custom_ops:residual_stack_cuda_rowwise",
    "//custom_ops:residual_stack_decode_cuda_decode",
    "//custom_ops:residual_stack_cuda_host",
    "//custom_ops:tensorflow_gpu",
)
OLDEST_CUDA = (12, 5)  # kernels take more than 4 KiB of parameters, and ask the driver for a function of a version
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
    """The folder of a CUDA toolkit that is new enough, or an empty string."""
    named = pathlib.Path(os.environ.get("CUDA_HOME", "/nowhere"), "bin", "nvcc")
    found = [str(named), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(None, found):
        if not pathlib.Path(nvcc).exists():
            continue
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", said)
        if not release or tuple(map(int, release.groups())) < OLDEST_CUDA:
            print(f"{nvcc} is not of CUDA {'.'.join(map(str, OLDEST_CUDA))} or later: not used", flush=True)
            continue
        # The program on the PATH may be a script: nvcc itself knows where it lives.
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        folder = pathlib.Path(top[1].strip()).resolve() if top else pathlib.Path(nvcc).resolve().parent.parent
        if (folder / "lib64" / "libcudart_static.a").exists():
            return str(folder)
    return ""


def architectures():
    """The GPU architectures to build for, as nvcc names them, least first."""
    asked = os.environ.get("STF_CUDA_ARCHITECTURES", "")
    if asked in ("all", "none"):
        return ALL_ARCHITECTURES if asked == "all" else ()
    if asked:
        names = asked.split(",")
        if not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
            sys.exit(f"STF_CUDA_ARCHITECTURES must be none, all, or names such as 80,90a. Received: {asked}")
        return tuple(names)
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said.stdout, re.MULTILINE)}
    # Hopper's kernels use what only its own, "architecture-specific" target has.
    return tuple("90a" if name == 90 else str(name) for name in sorted(found) if name >= 80)


def bazel_build(targets, wanted, install_bazel=False):
    """Runs Bazel for targets; returns TensorFlow's version and, where there is an nvcc, the wanted architectures."""
    bazel, bazel_version = find_bazel(install_bazel)
    version, folder = tensorflow()
    toolkit = cuda() if wanted else ""
    if wanted and not toolkit:
        oldest = ".".join(map(str, OLDEST_CUDA))
        what = f"CUDA kernels for {','.join(wanted)} need nvcc of CUDA {oldest} or later, which was not found"
        if os.environ.get("STF_CUDA_ARCHITECTURES"):
            sys.exit(f"{what}. Name its folder in CUDA_HOME, or ask for none: STF_CUDA_ARCHITECTURES=none.")
        print(f"{what}: building the CPU's alone", flush=True)
    environment = {
        "STF_TENSORFLOW_INCLUDE": folder / "include",
        "STF_TENSORFLOW_LIB": folder,
        # What tf.sysconfig.get_compile_flags() says of TensorFlow 2.21's wheel, and what its build aligned Eigen to.
        "STF_TENSORFLOW_DEFINES": "_GLIBCXX_USE_CXX11_ABI=1 EIGEN_MAX_ALIGN_BYTES=64",
        "STF_CUDA": toolkit,
        "STF_CUDA_ARCHITECTURES": ",".join(wanted) if toolkit else "",
    }
    command = [bazel, "--max_idle_secs=60", "build", *targets, *flags_for(bazel_version)]
    command += [f"--repo_env={name}={value}" for name, value in environment.items()]
    if os.environ.get("STF_BAZEL_OUTPUT"):
        command.insert(1, f"--output_user_root={os.environ['STF_BAZEL_OUTPUT']}")
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        sys.exit(f"Bazel ended with status {status}: {' '.join(map(str, command))}")
    return version, wanted if toolkit else ()


def build(install_bazel=False):
    """Builds the library; returns its path and that of the file that says what it was built for."""
    wanted = architectures()
    print(f"building for the CPU{''.join(f', sm_{name}' for name in wanted)}", flush=True)
    version, built = bazel_build([TARGET], wanted, install_bazel)
    # A new file under a new name, then renamed: a process that has the old one mapped keeps it.
    fresh = LIBRARY.with_suffix(".so.new")
    shutil.copyfile(ROOT / "bazel-bin" / "custom_ops" / "libstf_ops.so", fresh)
    fresh.chmod(0o755)
    fresh.replace(LIBRARY)
    fresh = BUILT_FOR.with_suffix(".json.new")
    fresh.write_text(json.dumps({"tensorflow": version, "cuda": built}) + "\n")
    fresh.replace(BUILT_FOR)
    return LIBRARY, BUILT_FOR


def check_cuda(install_bazel=False):
    """Compiles `CUDA_SAMPLE` for Hopper, where both paths of the kernels are, if there is an nvcc."""
    if cuda():
        bazel_build(CUDA_SAMPLE, ("90a",), install_bazel)
    else:
        print("no nvcc found: CUDA kernels are not compiled")


if __name__ == "__main__":
    if "--check-cuda" in sys.argv[1:]:
        check_cuda("--install-bazel" in sys.argv[1:])
    else:
        print("built", build("--install-bazel" in sys.argv[1:])[0].relative_to(ROOT))
