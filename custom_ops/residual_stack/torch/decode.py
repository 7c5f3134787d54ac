"""The decode kernel on PyTorch tensors, through ctypes: for tests and benchmarks where TensorFlow is not at hand.

The library is built with nvcc when it is first needed, for the GPU at hand, into build/cuda below the repository.
"""

import ctypes
import functools
import pathlib
import subprocess

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[3]
SOURCE = ROOT / "custom_ops" / "residual_stack" / "cuda" / "decode.cu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CachePart(ctypes.Structure):
    """stf_cache_part."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("keys", "values")] + [
        (name, ctypes.c_int64) for name in ("slots", "reads")
    ]


class Problem(ctypes.Structure):
    """stf_decode."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("blocks", "batch", "width", "hidden_width")]
        + [(name, ctypes.c_int64) for name in ("heads", "key_depth", "value_depth")]
        + [(name, ctypes.c_int32) for name in ("dtype", "cache_dtype")]
        + [(name, ctypes.c_float) for name in ("epsilon", "scale")]
        + [("period", ctypes.c_int32)]
        + [(name, ctypes.POINTER(ctypes.c_int32)) for name in ("first_program", "first_part")]
        + [("parts", ctypes.POINTER(CachePart))]
        + [(name, ctypes.c_void_p) for name in ("reads", "writes")]
    )


class Weights(ctypes.Structure):
    """stf_stack_weights."""

    _fields_ = [(f"weight_{i}", ctypes.c_void_p) for i in range(8)]


@functools.cache
def load():
    """The library, compiled anew where its sources are newer."""
    target = ROOT / "build" / "cuda" / "libstf_decode.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in SOURCE.parent.iterdir())
    if not target.exists() or target.stat().st_mtime < newest:
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{ROOT}"]
        subprocess.run([*command, "-cudart=static", "-o", str(target), str(SOURCE)], check=True)
    library = ctypes.CDLL(str(target))
    library.stf_stack_cuda_decode_workspace.restype = ctypes.c_size_t
    library.stf_stack_cuda_decode.restype = ctypes.c_char_p
    return library


class Decode:
    """A stack that is run one position at a time, prepared once.

    Args:
        weights: the eight tensors of `stf_stack_weights`.
        batch, heads, key_depth, value_depth: sizes.
        patterns: for each pattern that blocks take in turn its programs, of each its parts' (slots, reads).
        cache_dtype: of keys and values.
    """

    def __init__(self, weights, batch, heads, key_depth, value_depth, patterns, cache_dtype, epsilon=1e-6):
        self.weights, self.batch = weights, batch
        blocks, width, hidden = weights[4].shape
        dtype = weights[0].dtype
        first_program, first_part, parts, self.caches = [0], [0], [], []
        for number, programs in enumerate(patterns):
            layers = len(range(number, blocks, len(patterns)))
            for program, of_program in enumerate(programs):
                own = len(range(program, heads, len(programs)))
                for slots, reads in of_program:
                    keys, values = (
                        torch.full([layers, slots, batch, own, depth], torch.nan, dtype=cache_dtype, device="cuda")
                        for depth in (key_depth, value_depth)
                    )
                    self.caches.append((keys, values))
                    parts.append(CachePart(keys.data_ptr(), values.data_ptr(), slots, reads))
                first_part.append(len(parts))
            first_program.append(len(first_part) - 1)
        self._arrays = (
            (ctypes.c_int32 * len(first_program))(*first_program),
            (ctypes.c_int32 * len(first_part))(*first_part),
            (CachePart * max(len(parts), 1))(*parts),
        )
        self.problem = Problem(
            blocks, batch, width, hidden, heads, key_depth, value_depth, DTYPES[dtype], DTYPES[cache_dtype], epsilon,
            key_depth**-0.5, len(patterns), *self._arrays, None, None,
        )  # fmt: skip
        self._weights = Weights(*(weight.data_ptr() for weight in weights))
        size = load().stf_stack_cuda_decode_workspace(ctypes.byref(self.problem))
        self._workspace = torch.full([size // 4], torch.nan, device="cuda")

    def __call__(self, x, reads, writes):
        """The output `[batch, width]` of input `x`; writes the caches. `reads` and `writes` are int32 on the device."""
        output = torch.full_like(x, torch.nan)
        self.problem.reads, self.problem.writes = reads.data_ptr(), writes.data_ptr()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = load().stf_stack_cuda_decode(
            ctypes.byref(self.problem), ctypes.byref(self._weights), ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(output.data_ptr()), ctypes.c_void_p(self._workspace.data_ptr()), stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(error.decode())
        return output


def random_weights(blocks, width, hidden, heads, key_depth, value_depth, dtype, seed=0):
    """Weights of a stack whose stream stays of about one size: kernels in `dtype`, biases in float32."""
    random = np.random.default_rng(seed)
    units, values = heads * (2 * key_depth + value_depth), heads * value_depth
    weights = []
    for rows, columns, size in (
        (width, units, 1),
        (values, width, blocks**-0.5),
        (width, hidden, 1),
        (hidden, width, blocks**-0.5),
    ):
        kernel = random.normal(size=(blocks, rows, columns)) * size * rows**-0.5
        weights.append(torch.tensor(kernel, dtype=torch.float32).to(dtype).cuda())
        weights.append(torch.tensor(random.normal(size=(blocks, columns)) * 0.1, dtype=torch.float32).cuda())
    return weights
