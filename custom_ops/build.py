"""Builds the op library with Bazel and puts it where `stf.ops` looks for it.

    python custom_ops/build.py                    # for the TensorFlow that is installed for this Python
    python custom_ops/build.py --install-bazel    # first install Debian's bazel-bootstrap, if no Bazel is found
    python custom_ops/build.py --check-cuda       # compile a part of the CUDA kernels, where nvcc is, and keep nothing

It is libstf_kernels.so, and over that a face for each minor version of TensorFlow, such as libstf_ops_2_21.so: for the
installed one, or with STF_TENSORFLOWS=all for every one that stf knows. Wheels that are missing for that pip downloads.

With Debian's Bazel it needs no other network: the rules are Bazel's own, TensorFlow's headers and library its wheel's.
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
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPS = ROOT / "stf" / "ops"
KERNELS = "libstf_kernels.so"
FACE = "libstf_ops_{}.so"
BUILT_FOR = "built_for.json"
# The minor versions that there is a face for, and the wheels that it is built from where another is installed.
TENSORFLOWS = {"2.19": "2.19.1", "2.20": "2.20.0", "2.21": "2.21.0"}
# TensorFlow 2.19's wheel lacks two of LLVM's headers, and xla/ffi/api/ffi.h. JAX's has the latter, of the same XLA: the
# headers beside it are TensorFlow's to the byte.
LLVM = ROOT / "third_party" / "tensorflow" / "2_19"
FFI = ("jaxlib", "0.5.1", "jaxlib/include/", ("xla/ffi/api/ffi.h",))
ALL_ARCHITECTURES = ("80", "90a", "100", "120")
# A part that holds every template of the kernels, bfloat16 and float32 at depths 64 and 128, and all that is not a
# kernel. (Whether there are tiles for the other depths is asserted there too.)
CUDA_SAMPLE = (
    "//custom_ops:attention_cuda_1_2",
    "//custom_ops:attention_cuda_0_2",
    "//custom_ops:attention_cuda_host",
    "//custom_ops:residual_stack_cuda_rowwise",
    "//custom_ops:residual_stack_decode_cuda_decode",
    "//custom_ops:residual_stack_cuda_host",
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


def tensorflows():
    """For each TensorFlow to build for ("2_21") folders with headers; the first is its own and has the libraries."""
    wanted = os.environ.get("STF_TENSORFLOWS", "")
    if wanted not in ("", "all"):
        sys.exit(f"STF_TENSORFLOWS must be all, or empty for the installed TensorFlow. Received: {wanted}")
    folders = {}
    if spec := importlib.util.find_spec("tensorflow"):
        version = importlib.metadata.version("tensorflow")
        folders[".".join(version.split(".")[:2])] = pathlib.Path(spec.origin).parent
    if wanted == "all":
        parts = ("include/", "libtensorflow_framework.so.2", "libtensorflow_cc.so.2")
        folders = {
            minor: folders.get(minor) or unpacked("tensorflow", version, "tensorflow/", parts)
            for minor, version in TENSORFLOWS.items()
        }
    elif not folders:
        sys.exit("TensorFlow is not installed for this Python: pip install -r requirements.lock")
    elif not folders.keys() <= TENSORFLOWS.keys():
        sys.exit(f"stf builds for TensorFlow {', '.join(TENSORFLOWS)}; TensorFlow {version} is installed")
    return {
        minor.replace(".", "_"): (folder, LLVM, unpacked(*FFI)) if minor == "2.19" else (folder,)
        for minor, folder in folders.items()
    }


def unpacked(package, version, top, parts):
    """A folder with the parts (files; folders, which end with a slash) that a package's wheel has below `top`."""
    folder = ROOT / "build" / f"{package}-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Headers and libraries are the same whatever the Python.
        tags = ("--python-version=3.11", "--platform=manylinux2014_x86_64", "--platform=manylinux_2_27_x86_64")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *tags]
        print(f"downloading {package} {version}", flush=True)
        if subprocess.run([*pip, f"--dest={scratch}", f"{package}=={version}"]).returncode:
            sys.exit(f"pip did not download {package}=={version}, which the op library is built from")
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        inside = tuple(top + part for part in parts)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(inside)])
        pathlib.Path(scratch, top).rename(folder)
    return folder


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


def bazel_build(targets, versions, wanted, install_bazel=False):
    """Runs Bazel for what `tensorflows` gave; returns the wanted architectures, none where there is no nvcc."""
    bazel, bazel_version = find_bazel(install_bazel)
    toolkit = cuda() if wanted else ""
    if wanted and not toolkit:
        oldest = ".".join(map(str, OLDEST_CUDA))
        what = f"CUDA kernels for {','.join(wanted)} need nvcc of CUDA {oldest} or later, which was not found"
        if os.environ.get("STF_CUDA_ARCHITECTURES"):
            sys.exit(f"{what}. Name its folder in CUDA_HOME, or ask for none: STF_CUDA_ARCHITECTURES=none.")
        print(f"{what}: building the CPU's alone", flush=True)
    for folder in (folder for folders in versions.values() for folder in folders):
        if re.search("[ :=]", str(folder)):
            sys.exit(f"Bazel cannot be told of a folder with a space, a colon or an equals sign. Received: {folder}")
    environment = {
        "STF_TENSORFLOWS": " ".join(f"{name}={':'.join(map(str, folders))}" for name, folders in versions.items()),
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
    return wanted if toolkit else ()


def build(install_bazel=False):
    """Builds the library; returns the paths of its parts and of the file that says which GPUs it was built for."""
    versions, wanted = tensorflows(), architectures()
    names = [KERNELS, *map(FACE.format, versions)]
    print(f"building {', '.join(names)} for the CPU{''.join(f', sm_{name}' for name in wanted)}", flush=True)
    built = bazel_build([f"//custom_ops:{name}" for name in names], versions, wanted, install_bazel)
    # A face for another TensorFlow, over the kernels of an earlier build.
    for path in OPS.glob("libstf_*.so"):
        if path.name not in names:
            path.unlink()
    for name in names:
        replace(OPS / name, (ROOT / "bazel-bin" / "custom_ops" / name).read_bytes())
    replace(OPS / BUILT_FOR, json.dumps({"cuda": built}).encode() + b"\n")
    return [OPS / name for name in (*names, BUILT_FOR)]


def replace(path, content):
    """Writes a new file under a new name, then renames it: a process that has the old one mapped keeps it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(content)
    fresh.chmod(0o755 if path.suffix == ".so" else 0o644)
    fresh.replace(path)


def check_cuda(install_bazel=False):
    """Compiles `CUDA_SAMPLE` for Hopper, where both paths of the kernels are, if there is an nvcc."""
    if cuda():
        versions = tensorflows()
        faces = [f"//custom_ops:tensorflow_gpu_{name}" for name in versions]
        bazel_build([*CUDA_SAMPLE, *faces], versions, ("90a",), install_bazel)
    else:
        print("no nvcc found: CUDA kernels are not compiled")


if __name__ == "__main__":
    if "--check-cuda" in sys.argv[1:]:
        check_cuda("--install-bazel" in sys.argv[1:])
    else:
        print("built", *(path.relative_to(ROOT) for path in build("--install-bazel" in sys.argv[1:])))
