"""The CPU kernels under g++'s sanitizers: attention_cpu.cc, for every instruction set that this CPU has."""

import ast
import concurrent.futures
import os
import pathlib
import re
import subprocess

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "custom_ops" / "attention" / "cpu"
# Flags, and the largest depth. No race depends on it, and what the thread sanitizer watches is slow.
SANITIZERS = {
    "address,undefined": (["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"], 256),
    "thread": ([], 32),
}


def variants():
    """The compiler's flags for each instruction set, from custom_ops/BUILD."""
    build = ast.parse((ROOT / "custom_ops" / "BUILD").read_text())
    calls = [node for node in ast.walk(build) if isinstance(node, ast.Call) and node.func.id == "cpu_kernels"]
    return next(ast.literal_eval(each.value) for each in calls[0].keywords if each.arg == "variants")


VARIANTS = variants()


def missing(isa):
    """What this CPU lacks of an instruction set."""
    has = set(re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needs = {flag.removeprefix("-m") for flag in VARIANTS[isa] if re.fullmatch(r"-m\w+", flag)}
    return needs - has


def run(command, **options):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[:10000]}"
    return done.stdout


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request, tmp_path_factory):
    """A command that runs everything under one sanitizer."""
    flags, depth = SANITIZERS[request.param]
    sanitize = ["-O1", f"-fsanitize={request.param}", *flags]
    sources = {KERNELS / f"kernels_{isa}.cc": [*([] if missing(isa) else sanitize), *VARIANTS[isa]] for isa in VARIANTS}
    sources |= {source: sanitize for source in sorted(KERNELS.glob("*.cc")) if source not in sources}
    sources[ROOT / "tests" / "sanitize" / "attention_cpu.cc"] = sanitize
    sources[ROOT / "tests" / "sanitize" / "dense_attention.cc"] = ["-O3"]
    folder = tmp_path_factory.mktemp("driver")
    objects = [folder / f"{source.stem}_{i}.o" for i, source in enumerate(sources)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        commands = [
            ["g++", "-std=c++17", "-Wall", "-g", "-I.", *flags, "-c", source, "-o", to]
            for (source, flags), to in zip(sources.items(), objects, strict=True)
        ]
        list(pool.map(run, commands))
    run(["g++", *sanitize, *objects, "-lpthread", "-o", folder / "attention_cpu"])
    # The thread sanitizer of g++ 12 does not start at some of the addresses that a recent kernel picks at random.
    plain = ["setarch", "--addr-no-randomize"]
    may = subprocess.run([*plain, "true"], capture_output=True).returncode == 0
    return [*(plain if may else []), folder / "attention_cpu", str(depth)]


@pytest.mark.parametrize("isa", VARIANTS)
def test_nothing_is_found(driver, isa):
    if missing(isa):
        pytest.skip(f"This CPU has no {', '.join(sorted(missing(isa)))}.")
    options = {"STF_CPU_ISA": isa, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    said = run(driver, env=os.environ | options, timeout=500)
    print(said)
    assert said.split()[-1] == isa
