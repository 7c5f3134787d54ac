"""What documents, shared key and value heads, and sinks cost on the GPU, beside the same without, and beside peers.

    python benchmarks/attention_features_gpu.py                  # benchmarks/results/attention_features_h100.json
    python benchmarks/attention_features_gpu.py --only=documents # rows whose feature has the word

Measured as benchmarks/attention_gpu.py measures: cold L2, device events, medians, bfloat16, all in one run. Each row is
a feature on, and "beside" says what stands next to it: off (the same pairs), the documents as sequences of their own,
copies of keys and values for every head, FlexAttention with the same mask (`document_mask` and window). Outputs are
compared before anything is timed.
"""

import argparse
import importlib.util
import json
import pathlib
import platform
import sys

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("attention_gpu", HERE / "attention_gpu.py")
attention_gpu = sys.modules["attention_gpu"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(attention_gpu)
torch_binding, patterns = attention_gpu.torch_binding, attention_gpu.patterns
Causal, Local, Strided, Fixed, Window, Sink = (
    getattr(patterns, name) for name in ("Causal", "Local", "Strided", "Fixed", "Window", "Sink")
)
CIFAR10, ENWIK8, AUDIO = attention_gpu.CIFAR10, attention_gpu.ENWIK8, attention_gpu.AUDIO
PASSES = attention_gpu.PASSES


def ours(arrays, pattern, **options):
    """(forward, forward and backward) calls of the kernels, and the output that they write."""
    query, key, value, grad = arrays
    attention = torch_binding.Attention(query, value, pattern, **options)
    output, grads = torch.empty_like(grad), [torch.empty_like(x) for x in (query, key, value)]
    log_sum_exp = torch.empty(query.shape[0], query.shape[2], query.shape[1], device="cuda")

    def forward():
        attention.forward(query, key, value, output, log_sum_exp)

    def both():
        forward()
        attention.backward(query, key, value, output, log_sum_exp, grad, None, *grads)

    return (forward, both), output


def bounds(batch, n, length):
    """stf_problem's documents of so many positions each, on the device."""
    place = np.arange(n)
    first = place // length * length
    pairs = np.stack([first, np.minimum(first + length, n)], -1).astype(np.int32)
    return torch.from_numpy(np.broadcast_to(pairs, (batch, n, 2)).copy()).cuda()


def flex(arrays, length, window):
    """FlexAttention within documents of so many positions, and a window or none."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query = arrays[0]
    _, n, heads, _ = query.shape
    document = torch.arange(n, device="cuda") // length

    def mask(b, h, i, j):
        inside = (document[i] == document[j]) & (i >= j)
        return inside & (i - j <= window) if window is not None else inside

    torch._dynamo.reset()
    block_mask = create_block_mask(mask, None, None, n, n, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask).transpose(1, 2)

    return attention_gpu.autograd(attend, arrays), attend(*arrays[:3])


def copies(arrays, pattern, heads):
    """The kernels on keys and values copied for each head, their gradients added."""
    query, key, value, grad = arrays
    shared = heads // key.shape[2]
    whole = [query, *(x.repeat_interleave(shared, dim=2) for x in (key, value)), grad]
    attention = torch_binding.Attention(query, whole[2], pattern)
    output, grads = torch.empty_like(grad), [torch.empty_like(x) for x in whole[:3]]
    log_sum_exp = torch.empty(query.shape[0], heads, query.shape[1], device="cuda")

    def forward():
        for copy, x in zip(whole[1:3], (key, value), strict=True):
            copy.unflatten(2, (-1, shared)).copy_(x.unsqueeze(3).expand(-1, -1, -1, shared, -1))
        attention.forward(*whole[:3], output, log_sum_exp)

    def both():
        forward()
        attention.backward(*whole[:3], output, log_sum_exp, grad, None, *grads)
        for x in grads[1:]:
            x.unflatten(2, (-1, shared)).sum(3)

    return (forward, both), output


def tensors(shape, key_heads=None):
    batch, heads, n, key_depth, value_depth = shape
    torch.manual_seed(0)
    key_heads = heads if key_heads is None else key_heads
    widths = ((heads, key_depth), (key_heads, key_depth), (key_heads, value_depth), (heads, value_depth))
    return [torch.randn(batch, n, count, depth, device="cuda", dtype=torch.bfloat16) for count, depth in widths]


def as_sequences(arrays, length):
    """Each document of so many positions a sequence of its own."""
    return [x.reshape(-1, length, *x.shape[2:]) for x in arrays]


def cases():
    """(feature, shape, pattern, {name: function that gives calls and output}), one after another."""
    for shape, pattern in (
        (CIFAR10, Local(128)),
        (CIFAR10, Strided(128)),
        (CIFAR10, Local(128) | Strided(128)),
        (ENWIK8, Causal()),
        (ENWIK8, Fixed(128, 32)),
        (AUDIO, Local(256)),
        (AUDIO, Strided(256)),
    ):
        batch, heads, n = shape[:3]
        arrays = tensors(shape)
        one = bounds(batch, n, n)
        sinks = torch.full([heads], -30.0, device="cuda")
        yield (
            "one document, and sinks",
            shape,
            pattern,
            {
                "off": lambda a=arrays, p=pattern: ours(a, p),
                "documents": lambda a=arrays, p=pattern, d=one: ours(a, p, documents=d),
                "sinks": lambda a=arrays, p=pattern, s=sinks: ours(a, p, sinks=s),
            },
        )
    for pattern, window in ((Causal(), None), (Local(128), 128)):
        for length in (3072, 1024, 256):
            arrays = tensors(ENWIK8)
            documents = bounds(ENWIK8[0], ENWIK8[2], length)
            apart = [x.contiguous() for x in as_sequences(arrays, length)]
            yield (
                f"documents of {length}",
                ENWIK8,
                pattern,
                {
                    "documents": lambda a=arrays, p=pattern, d=documents: ours(a, p, documents=d),
                    "sequences of their own": lambda a=apart, p=pattern: ours(a, p),
                    "flex attention": lambda a=arrays, m=length, w=window: flex(a, m, w),
                },
            )
    for pattern in (Causal(), Local(128), Strided(128)):
        for key_heads in (1, 2, 4):
            arrays = tensors(ENWIK8, key_heads)
            yield (
                f"{key_heads} key heads of 8",
                ENWIK8,
                pattern,
                {
                    "shared": lambda a=arrays, p=pattern: ours(a, p),
                    "copies": lambda a=arrays, p=pattern: copies(a, p, 8),
                },
            )
    arrays = tensors(ENWIK8)
    yield (
        "first positions",
        ENWIK8,
        Window(128),
        {
            "window": lambda: ours(arrays, Window(128)),
            "window | Sink(4)": lambda: ours(arrays, Window(128) | Sink(4)),
            "window | Sink(64)": lambda: ours(arrays, Window(128) | Sink(64)),
        },
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    out = arguments.out or HERE / "results" / f"attention_features_{device.split()[1].lower()}.json"
    about = {
        "machine": device,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "command": " ".join(["python benchmarks/attention_features_gpu.py", *sys.argv[1:]]),
    }
    timer, rows = attention_gpu.Timer(), []
    for feature, shape, pattern, calls in cases():
        if arguments.only not in feature:
            continue
        outputs, first = {}, None
        for name, make in calls.items():
            passes, output = make()
            passes[1]()
            torch.cuda.synchronize()
            if first is None:
                first = output.clone()
            elif "Sink(" not in name:
                error = (output.reshape(first.shape).float() - first.float()).abs().max().item()
                assert error < 0.05, f"{feature} {pattern}: {name} differs by {error}"
            ms = [timer(each) for each in passes]
            outputs[name] = ms
            for which, each in zip(PASSES, ms, strict=True):
                ratio = each / next(iter(outputs.values()))[PASSES.index(which)]
                rows.append(
                    {"feature": feature, "shape": list(shape), "pattern": repr(pattern), "implementation": name}
                    | {"pass": which, "ms": each, "ratio_to_first": ratio}
                )
                print(
                    f"{feature:24s} {shape!s:26s} {pattern!r:36s} {name:22s} {which:16s} {each:8.4f} ms x {ratio:5.3f}",
                    flush=True,
                )
        out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")  # after each: nothing is lost
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
