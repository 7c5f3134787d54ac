"""Milliseconds of a token through all blocks by the decode kernel alone, beside the bytes that it cannot but read.

    python benchmarks/decode_gpu.py          # needs PyTorch, nvcc and an NVIDIA GPU; the table

The paper's models with random weights and caches, at the end of a sequence: all that its last positions read. Floor:
weights and what is read of the caches, once, at 3 TB/s, about what an H100's memory gives.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "custom_ops" / "residual_stack" / "torch"))
import decode

CIFAR10 = {"blocks": 128, "width": 256, "hidden": 512, "heads": 2, "key_depth": 64, "value_depth": 128}
ENWIK8 = {"blocks": 30, "width": 512, "hidden": 2048, "heads": 8, "key_depth": 64, "value_depth": 64}
# For each pattern in turn, for each program, its parts' slots and how many of them a position reads.
STRIDED = [[[(97, 97)]], [[(3072, 32)]]]
FIXED = [[[(128, 128), (3072, 3072)]]]
ROWS = [
    *(("cifar10", CIFAR10, STRIDED, batch) for batch in (1, 4, 16, 64)),
    *(("enwik8", ENWIK8, FIXED, batch) for batch in (1, 16)),
    ("cifar10, dense", CIFAR10, [[[(3072, 3072)]]], 1),
]
MEMORY = 3e12  # bytes a second


def measure(blocks, width, hidden, heads, key_depth, value_depth, patterns, batch, dtype=torch.bfloat16):
    """Milliseconds of a token, and the floor's."""
    weights = decode.random_weights(blocks, width, hidden, heads, key_depth, value_depth, dtype)
    run = decode.Decode(weights, batch, heads, key_depth, value_depth, patterns, dtype)
    for tensor in (x for pair in run.caches for x in pair):
        tensor.normal_()
    parts = [part for programs in patterns for program in programs for part in program]
    random = np.random.default_rng(0)
    reads = np.concatenate([np.sort(random.permutation(slots)[:count]) for slots, count in parts])
    reads = torch.tensor(reads, dtype=torch.int32, device="cuda")
    writes = torch.zeros(len(parts), dtype=torch.int32, device="cuda")
    x = torch.randn(batch, width, device="cuda").to(dtype)
    for _ in range(3):
        run(x, reads, writes)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            run(x, reads, writes)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 5)
    read = sum(count for _, count in parts) / len(patterns) * blocks * batch * heads * (key_depth + value_depth) * 2
    return min(times), 1e3 * (read + sum(w.numel() * w.element_size() for w in weights)) / MEMORY


def main():
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bfloat16")
    print(f"{'model':18}{'batch':>6}{'ms':>9}{'us a block':>12}{'floor ms':>10}")
    for name, sizes, patterns, batch in ROWS:
        ms, floor = measure(**sizes, patterns=patterns, batch=batch)
        print(f"{name:18}{batch:6}{ms:9.3f}{1e3 * ms / sizes['blocks']:12.1f}{floor:10.3f}", flush=True)


if __name__ == "__main__":
    main()
