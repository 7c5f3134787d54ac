"""The CUDA kernels on PyTorch tensors, through ctypes: for tests and benchmarks where TensorFlow is not at hand.

The library is built with nvcc when it is first needed, for the GPU at hand, into build/cuda below the repository.
"""

import concurrent.futures
import ctypes
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import torch

ROOT = pathlib.Path(__file__).resolve().parents[3]
SOURCES = ROOT / "custom_ops" / "attention" / "cuda"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def import_patterns():
    """`stf.patterns`, which needs NumPy alone, also where the rest of stf cannot be imported."""
    if importlib.util.find_spec("tensorflow") is None and "stf" not in sys.modules:
        package = types.ModuleType("stf")
        package.__path__ = [str(ROOT / "stf")]
        sys.modules["stf"] = package
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("stf.patterns")


class Component(ctypes.Structure):
    """stf_component."""

    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "a", "b", "c", "d", "exclude")]


class Problem(ctypes.Structure):
    """stf_problem."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "positions", "heads", "key_depth", "value_depth")] + [
        ("dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("programs", ctypes.c_int32),
        ("program_begin", ctypes.POINTER(ctypes.c_int32)),
        ("components", ctypes.POINTER(Component)),
        ("layouts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("documents", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("key_heads", ctypes.c_int64),
    ]


class Tensor(ctypes.Structure):
    """stf_tensor."""

    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "position_stride", "head_stride")
    ]


def build(folder=ROOT / "build" / "cuda", flags=()):
    """Compiles the kernels; returns the library's path. Sources that have not changed are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    newest = max(path.stat().st_mtime for path in [*SOURCES.rglob("*.*"), *SOURCES.parent.glob("*.h")])

    def compile_one(job):
        source, name, defines = job
        target = folder / f"{name}.o"
        if not target.exists() or target.stat().st_mtime < newest:
            command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC", f"-I{ROOT}", *defines]
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(source), "-o", str(target), *flags]
            subprocess.run(command, check=True)
        return str(target)

    jobs = [
        (SOURCES / "kernels.cu", f"kernels_{dtype}_{depths}", [f"-DSTF_DTYPE={dtype}", f"-DSTF_DEPTHS={depths}"])
        for depths in reversed(range(5))
        for dtype in range(3)
    ]
    jobs += [(source, source.stem, []) for source in SOURCES.rglob("*.cc")]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "libstf_attention_cuda.so"
    subprocess.run(["nvcc", "-shared", "-cudart=static", "-o", str(library), *objects], check=True)
    return library


@functools.cache
def load():
    """The library: the one that STF_CUDA_LIBRARY in the environment names, or built if need be."""
    library = ctypes.CDLL(os.environ.get("STF_CUDA_LIBRARY") or str(build()))
    library.stf_attention_cuda_error.restype = ctypes.c_char_p
    for name in ("forward", "backward"):
        getattr(library, f"stf_attention_cuda_{name}_workspace").restype = ctypes.c_size_t
    return library


class Attention:
    """Attention of tensors like `query` [batch, position, head, depth] over a pattern, prepared once.

    Args:
        query, value: tensors whose shapes, dtype and device count; the value's heads may be fewer, and shared.
        pattern: a `stf.patterns.Pattern`.
        lengths: int32 tensor `[batch]` on the device, or None.
        scale: of the scores, or None.
        documents: int32 tensor `[batch, position, 2]` on the device (`stf_problem` says what it holds), or None.
        restart: whether the pattern is counted from each document's first position on.
        sinks: float32 tensor `[head]` on the device, or None.
    """

    def __init__(self, query, value, pattern, lengths=None, scale=None, documents=None, restart=False, sinks=None):
        import_patterns()
        from stf.patterns import lower

        batch, positions, heads, depth = query.shape
        program = lower(pattern, heads, restart)
        records = program.components
        self._begin = (ctypes.c_int32 * len(program.program_begin))(*program.program_begin)
        self._components = (Component * (len(records) // 6))(
            *(Component(*records[i : i + 6]) for i in range(0, len(records), 6))
        )
        self._layouts = torch.tensor(list(program.layouts) or [0], dtype=torch.uint8, device=query.device)
        self._kept = lengths, documents, sinks
        self._problem = Problem(
            batch,
            positions,
            heads,
            depth,
            value.shape[3],
            DTYPES[query.dtype],
            depth**-0.5 if scale is None else scale,
            len(program.program_begin) - 1,
            self._begin,
            self._components,
            self._layouts.data_ptr(),
            *(None if x is None else x.data_ptr() for x in (lengths, documents, sinks)),
            value.shape[2],
        )
        size = load().stf_attention_cuda_backward_workspace(ctypes.byref(self._problem))
        self.workspace_bytes = size  # of a backward pass; a forward one needs no more
        self._workspace = torch.full([max(size // 4, 1)], torch.nan, device=query.device)

    def forward(self, query, key, value, output, log_sum_exp):
        """Writes output `[B, T, H, value_depth]` and float32 log_sum_exp `[B, H, T]`."""
        self._call("forward", query, key, value, output, log_sum_exp)

    def backward(self, query, key, value, output, log_sum_exp, output_grad, log_sum_exp_grad, *grads):
        """Writes the gradients of query, key and value; log_sum_exp_grad may be None."""
        self._call("backward", query, key, value, output, log_sum_exp, output_grad, log_sum_exp_grad, *grads)

    def arguments(self, *tensors):
        """The arguments of an entry point for `tensors`, None for a null pointer."""
        workspace, stream = self._workspace.data_ptr(), torch.cuda.current_stream().cuda_stream
        tensors = [self._argument(tensor) for tensor in tensors]
        return [ctypes.byref(self._problem), *tensors, ctypes.c_void_p(workspace), ctypes.c_void_p(stream)]

    def _call(self, name, *tensors):
        error = getattr(load(), f"stf_attention_cuda_{name}")(*self.arguments(*tensors))
        if error:
            raise RuntimeError(f"{name}: {load().stf_attention_cuda_error(error).decode()}")

    @staticmethod
    def _argument(tensor):
        if tensor is None or tensor.dim() == 3:  # statistics
            return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
        return ctypes.byref(Tensor(tensor.data_ptr(), *tensor.stride()[:3]))
