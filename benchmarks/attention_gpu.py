"""Attention on the GPU, beside its peers and its floor, all measured in one run.

    python benchmarks/attention_gpu.py                         # the table, and benchmarks/results/attention_h100.json
    python benchmarks/attention_gpu.py --only=local --peers=   # rows whose pattern has the word, ours alone
    python benchmarks/attention_gpu.py --before=before.so      # beside another build of the kernels, in the same run
    python benchmarks/attention_gpu.py --generic               # beside the kernels that every card runs (sm80)
    python benchmarks/attention_plot.py                        # docs/attention_h100.svg from the JSON

Cold L2 (a large buffer is read before each call), device events, medians; results are checked first. The floor of a row
is the larger of its exact floating-point operations over the matmul rate and its least bytes over the copy rate, both
measured first; its share is floor / time. Peers: FlexAttention with the same mask, SDPA on the transposed sequence
(strided), dense causal SDPA with the flash and the cuDNN back ends. "host" is a call's time on the host, of many in a
row without the pause that hides it. The file is named after the card. Needs PyTorch, nvcc and an NVIDIA GPU, no
TensorFlow.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location(
    "torch_binding", HERE.parent / "custom_ops" / "attention" / "torch" / "binding.py"
)
torch_binding = sys.modules["torch_binding"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(torch_binding)
patterns = torch_binding.import_patterns()
Causal, Local, Strided, Fixed = patterns.Causal, patterns.Local, patterns.Strided, patterns.Fixed

CIFAR10, ENWIK8, IMAGENET64 = (
    (16, 2, 3072, 64, 128),
    (4, 8, 12288, 64, 64),
    (4, 16, 12288, 32, 32),
)  # batch, heads, n, d_qk, d_v
AUDIO, LONG_AUDIO = (1, 8, 65536, 64, 64), (1, 4, 1048576, 32, 32)
ROWS = [
    (CIFAR10, Local(128), (0.75, 0.62)),
    (CIFAR10, Strided(128), (0.78, 0.62)),
    (CIFAR10, Strided(96), (0.83, 0.66)),
    (CIFAR10, Local(128) | Strided(128), (0.50, 0.40)),
    (ENWIK8, Causal(), (0.68, 0.58)),
    (ENWIK8, Fixed(128, 32), (0.56, 0.48)),
    (IMAGENET64, Local(128), (0.55, 0.45)),
    (IMAGENET64, Strided(128), (0.60, 0.52)),
    (AUDIO, Local(256), (0.62, 0.52)),
    (AUDIO, Strided(256), (0.92, 0.58)),
    (LONG_AUDIO, Local(1024), (0.50, 0.45)),
    (LONG_AUDIO, Strided(1024), (0.50, 0.45)),
]
PASSES = "forward", "forward+backward"


class Timer:
    """Median milliseconds on the device, with a cold L2."""

    def __init__(self):
        self.buffer = torch.zeros(64 << 20, device="cuda")

    def __call__(self, call, repeats=20, warm=3):
        for _ in range(warm):
            call()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.sum()  # reads: the cache holds nothing of ours, and nothing that is to be written back
            torch.cuda._sleep(1_000_000)  # the host is ahead of the device, so that launches cost nothing
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return float(np.median(times))


def rates(timer):
    """(FLOP/s of a bfloat16 matmul of 8192^3, bytes/s of a copy, read plus write)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / timer(lambda: a @ b) * 1e3
    source = torch.randn(512 << 20, device="cuda")
    target = torch.empty_like(source)
    return matmul, 2 * source.nbytes / timer(lambda: target.copy_(source)) * 1e3


def inputs(shape, dtype):
    batch, heads, n, key_depth, value_depth = shape
    torch.manual_seed(0)
    depths = key_depth, key_depth, value_depth, value_depth
    return [torch.randn(batch, n, heads, depth, device="cuda").to(dtype) for depth in depths]


def use_library(path, kernels=""):
    """Has the kernels come from a library that is built already, or from the sources where that is None.

    kernels: "sm80" for those that every card runs, "" for the card's best.
    """
    os.environ.pop("STF_CUDA_LIBRARY", None)
    if path:
        os.environ["STF_CUDA_LIBRARY"] = str(pathlib.Path(path).resolve())
    os.environ["STF_CUDA_KERNELS"] = kernels
    torch_binding.load.cache_clear()


def ours(pattern, query, key, value, grad):
    """(forward, forward and backward) calls, the tensors that they write, and the bytes that both need beside."""
    attention = torch_binding.Attention(query, value, pattern)
    batch, n, heads, _ = query.shape
    output, grads = torch.empty_like(value), [torch.empty_like(x) for x in (query, key, value)]
    log_sum_exp = torch.empty(batch, heads, n, device="cuda")

    def forward():
        attention.forward(query, key, value, output, log_sum_exp)

    def both():
        forward()
        attention.backward(query, key, value, output, log_sum_exp, grad, None, *grads)

    inputs = query, key, value, output, log_sum_exp
    host = [
        host_microseconds("forward", attention.arguments(*inputs)),
        host_microseconds("backward", attention.arguments(*inputs, grad, None, *grads)),
    ]
    return (forward, both), (output, log_sum_exp, *grads), attention.workspace_bytes, (host[0], sum(host))


@functools.cache
def host_time():
    """benchmarks/host_time.cc, built."""
    library = pathlib.Path(tempfile.mkdtemp()) / "host_time.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{torch_binding.ROOT}", str(HERE / "host_time.cc")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def host_microseconds(name, arguments, calls=50, repeats=20):
    """Host time of one call in C, the device keeping up: the median of `repeats` runs of so many calls."""
    seconds = getattr(host_time(), f"stf_{name}_seconds")
    seconds.restype = ctypes.c_double
    entry = getattr(torch_binding.load(), f"stf_attention_cuda_{name}")
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        times.append(seconds(calls, entry, *arguments))
    torch.cuda.synchronize()
    assert min(times) > 0, "a call was refused"
    return 1e6 * float(np.median(times)) / calls


def check(pattern, arrays, results):
    """Sampled rows of output and query gradient against float64, and two identities that tie all gradients together."""
    query, key, value, grad = arrays
    output, log_sum_exp, query_grad, key_grad, value_grad = results
    assert not any(torch.isnan(x).any() for x in results), "NaN"
    batch, n, heads, depth = query.shape
    draw = np.random.default_rng(0)
    worst = 0.0
    for sample in range(24):
        b, h, i = sample % batch, sample % heads, int(draw.integers(n))
        keys = torch.from_numpy(pattern.keys(i, h)).cuda()
        if not len(keys):
            continue
        q, k, v, g = (
            query[b, i, h].double(),
            key[b, keys, h].double(),
            value[b, keys, h].double(),
            grad[b, i, h].double(),
        )
        score = k @ q / math.sqrt(depth)
        weight = torch.softmax(score, 0)
        out = weight @ v
        expected = out, torch.logsumexp(score, 0), (weight * (v @ g - out @ g)) @ k / math.sqrt(depth)
        found = output[b, i, h], log_sum_exp[b, h, i], query_grad[b, i, h]
        sizes = v.norm() / len(keys) ** 0.5, 1.0, g.norm()  # of one value, of a score, of a gradient
        worst = max(
            worst,
            *(((x - y).norm() / max(y.norm(), z)).item() for x, y, z in zip(found, expected, sizes, strict=True)),
        )
    assert worst < 2e-2, f"relative error {worst}"
    if all(len(pattern.keys(0, h)) for h in range(heads)):
        sums = value_grad.double().sum(1), grad.double().sum(1)
        assert (sums[0] - sums[1]).norm() < 1e-2 * sums[1].norm(), "value_grad does not add up"
    products = [(x.double() * y.double()).sum((1, 3)) for x, y in ((query, query_grad), (key, key_grad))]
    size = (query.double() * query_grad.double()).norm()
    assert (products[0] - products[1]).abs().max() < 1e-2 * size + 1e-3, "query_grad and key_grad do not agree"
    return worst


def autograd(attend, arrays):
    """(forward, forward and backward) calls of a PyTorch function of query, key and value."""
    *tensors, grad = arrays
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward():
        with torch.no_grad():
            return attend(*tensors)

    def both():
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves).backward(grad)

    return forward, both


def peers(pattern, arrays, chosen):
    """Yields (name, calls) of what a user has elsewhere."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    query = arrays[0]
    _, n, heads, _ = query.shape

    def dense(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(
                    1, 2
                )

        return attend

    def transposed(q, k, v):
        l = pattern.stride
        rows = (x.reshape(x.shape[0], n // l, l * heads, -1).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).reshape(v.shape)

    if "sdpa" in chosen and isinstance(pattern, Strided):
        yield "sdpa transposed", autograd(transposed, arrays)
    if "sdpa" in chosen and n <= 65536:
        if query.dtype == torch.float32:
            yield "sdpa dense", autograd(dense(SDPBackend.EFFICIENT_ATTENTION), arrays)
        else:
            yield "sdpa dense flash", autograd(dense(SDPBackend.FLASH_ATTENTION), arrays)
            yield "sdpa dense cudnn", autograd(dense(SDPBackend.CUDNN_ATTENTION), arrays)
    if "flex" in chosen and n <= 12288:
        yield "flex attention", autograd(flex(pattern, n, heads), arrays)


def mask_function(leaf):
    """FlexAttention's mask of a leaf pattern."""
    if isinstance(leaf, Local):
        return lambda b, h, i, j: (i >= j) & (i - j <= leaf.window)
    if isinstance(leaf, Strided):
        return lambda b, h, i, j: (i >= j) & ((i - j) % leaf.stride == 0)
    if isinstance(leaf, patterns.OwnBlock):
        return lambda b, h, i, j: (i >= j) & (i // leaf.stride == j // leaf.stride)
    if isinstance(leaf, patterns.Summary):
        blocks = leaf.stride // leaf.summary

        def summary(b, h, i, j):
            end = leaf.stride - leaf.summary * (h % blocks)
            return (i >= j) & (j % leaf.stride < end) & (j % leaf.stride >= end - leaf.summary)

        return summary
    return lambda b, h, i, j: i >= j


def flex(pattern, n, heads):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, or_masks

    parts = getattr(pattern, "parts", None) or [pattern]
    mask = or_masks(*(mask_function(part) for part in parts))
    torch._dynamo.reset()  # or else after some rows nothing is compiled any more
    block_mask = create_block_mask(mask, None, heads, n, n, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask).transpose(1, 2)

    return attend


def measure(shape, pattern, dtype, timer, matmul, copy, chosen, libraries):
    """Rows of ours, of each library, and of the peers."""
    batch, heads, n, key_depth, value_depth = shape
    arrays = inputs(shape, dtype)
    sizes = dict(key_dim=key_depth, value_dim=value_depth, num_heads=heads, batch=batch)

    def row(name, which, ms, peak=None, host_us=None):
        backward = which == PASSES[1]
        flops = pattern.flops(n, backward=backward, **sizes)
        moved = pattern.bytes(n, backward=backward, itemsize=dtype.itemsize, **sizes)
        floor = 1e3 * max(flops / matmul, moved / copy)
        r = dict(shape=list(shape), pattern=repr(pattern), dtype=str(dtype), implementation=name)
        r |= {"pass": which, "ms": ms, "floor_ms": floor, "share": floor / ms, "peak_bytes": peak, "host_us": host_us}
        print(
            f"{shape!s:28s} {repr(pattern)[:34]:34s} {str(dtype)[6:]:9s}{name:18s}{which:17s}"
            f"{ms:9.4f} ms  floor {floor:8.4f}  share {r['share']:5.3f}"
            + (f"  host {host_us:5.1f} us" if host_us else ""),
            flush=True,
        )
        return r

    rows = []
    for name, library in libraries.items():
        use_library(*library)
        calls, results, workspace, host = ours(pattern, *arrays)
        for x in results:
            x.fill_(torch.nan)
        calls[1]()
        torch.cuda.synchronize()
        check(pattern, arrays, results)
        for index, which in enumerate(PASSES):
            rows.append(row(name, which, timer(calls[index]), workspace if index else 0, host[index]))
    for name, peer in peers(pattern, arrays, chosen):
        for index, which in enumerate(PASSES):
            try:
                peer[index]()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                peer[index]()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before
                rows.append(row(name, which, timer(peer[index], repeats=10), peak))
            except RuntimeError as error:
                print(f"{name} {which}: {str(error).splitlines()[0][:120]}", flush=True)
    return rows


def write(path, matmul, copy, rows):
    """The results so far as JSON."""
    result = {
        "machine": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "command": " ".join(["python benchmarks/attention_gpu.py", *sys.argv[1:]]),
        "matmul_flops": matmul,
        "copy_bytes_per_second": copy,
        "rows": rows,
    }
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run only rows whose shape and pattern contain this")
    parser.add_argument("--peers", default="sdpa,flex", help="which peers to run beside ours")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--before", help="another build of the kernels, measured beside")
    parser.add_argument("--generic", action="store_true", help="beside the kernels that every card runs, too")
    parser.add_argument("--output", help="the JSON; benchmarks/results/attention_<card>.json where not given")
    options = parser.parse_args()
    card = torch.cuda.get_device_name().split()[1].lower()
    output = options.output or str(HERE / "results" / f"attention_{card}.json")
    built = os.environ.get("STF_CUDA_LIBRARY")
    libraries = {"stf before": (options.before,)} if options.before else {}
    libraries |= {"stf sm80": (built, "sm80")} if options.generic else {}
    libraries["stf"] = (built, os.environ.get("STF_CUDA_KERNELS", ""))
    timer = Timer()
    matmul, copy = rates(timer)
    print(
        f"{torch.cuda.get_device_name()}: matmul 8192^3 {matmul / 1e12:.0f} TFLOP/s bfloat16, "
        f"copy {copy / 1e9:.0f} GB/s"
    )
    rows, short = [], []
    for shape, pattern, targets in ROWS:
        if options.only.lower() not in f"{shape} {pattern!r}".lower():
            continue
        for dtype in options.dtypes.split(","):
            chosen = options.peers.split(",")
            found = measure(shape, pattern, getattr(torch, dtype), timer, matmul, copy, chosen, libraries)
            rows += found
            reached = [r["share"] for r in found if r["implementation"] == "stf"]
            short += [(shape, pattern, p, s, t) for p, s, t in zip(PASSES, reached, targets, strict=True) if s < t]
            torch.cuda.empty_cache()
            write(output, matmul, copy, rows)  # after every row: nothing is lost
    for shape, pattern, which, share, target in short:
        print(f"short of its target: {shape} {pattern!r} {which}: {share:.3f} < {target}")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
