"""The decode kernel against float64 mathematics over whole sequences. Needs PyTorch, nvcc and an NVIDIA GPU.

The error is at most twice that of the same maths, whole sequences at once, by PyTorch in that dtype.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

_PATH = pathlib.Path(__file__).parents[2] / "custom_ops" / "residual_stack" / "torch" / "decode.py"
_SPEC = importlib.util.spec_from_file_location("torch_decode", _PATH)
torch_decode = sys.modules["torch_decode"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(torch_decode)

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def whole(x, weights, heads, key_depth, value_depth, masks, dtype, epsilon=1e-6):
    """The stack over all positions of `[batch, position, width]` at once; masks are each pattern's, `[head, n, n]`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    x = x.to(dtype)
    batch, n, width = x.shape

    def normalize(x):
        exact = x if dtype == torch.float64 else x.float()
        exact = exact - exact.mean(-1, keepdim=True)
        return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)).to(dtype)

    for block in range(len(weights[0])):
        w = [weight[block].to(dtype) for weight in weights]
        mask = masks[block % len(masks)]
        keys = heads * key_depth
        query, key, value = (normalize(x) @ w[0] + w[1]).split([keys, keys, heads * value_depth], -1)
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in (query, key, value))
        score = torch.einsum("bihd,bjhd->bhij", query, key) * key_depth**-0.5
        weight = torch.softmax(score.masked_fill(~mask[None], -torch.inf), -1).nan_to_num(0)
        attended = torch.einsum("bhij,bjhd->bihd", weight, value).flatten(2)
        x = x + attended @ w[2] + w[3]
        hidden = normalize(x) @ w[4] + w[5]
        x = x + (hidden * torch.sigmoid(1.702 * hidden)) @ w[6] + w[7]
    return x


def random_parts(random, n, count):
    """Disjoint causal masks `[n, n]` of a program's parts; a position's own key may be in none, nor any other."""
    kept = np.tril(random.random((n, n)) < 0.6)
    part = random.integers(0, max(count, 1), (n, n))
    return [kept & (part == number) for number in range(count)]


def check(
    n, batch=2, width=32, hidden=64, heads=2, depths=(16, 32), blocks=3, patterns=((1,),), dtype=BFLOAT, cache=None
):
    """`patterns`: of each pattern, how many parts each of its programs has."""
    cache = dtype if cache is None else cache
    random = np.random.default_rng(n + batch + width + heads)
    weights = torch_decode.random_weights(blocks, width, hidden, heads, *depths, dtype)
    x = torch.tensor(random.normal(size=(batch, n, width)), dtype=torch.float32).to(dtype).cuda()
    parts = [[random_parts(random, n, count) for count in programs] for programs in patterns]
    masks = []
    for programs in parts:
        of_heads = [np.logical_or.reduce([np.zeros((n, n), bool), *programs[h % len(programs)]]) for h in range(heads)]
        masks.append(torch.from_numpy(np.stack(of_heads)).cuda())
    # A slot for each position, in any order; slots that are not read are -1.
    flat = [part for programs in parts for program in programs for part in program]
    slots = [random.permutation(n).astype(np.int32) for _ in flat]
    decode = torch_decode.Decode(
        weights, batch, heads, *depths, [[[(n, n)] * count for count in programs] for programs in patterns], cache
    )
    outputs = []
    for i in range(n):
        reads = [np.where(part[i], slot, -1) for part, slot in zip(flat, slots, strict=True)]
        writes = [slot[i] for slot in slots]
        reads = torch.tensor(np.concatenate([*reads, [-1]]), dtype=torch.int32, device="cuda")
        writes = torch.tensor([*writes, -1], dtype=torch.int32, device="cuda")
        outputs.append(decode(x[:, i].contiguous(), reads, writes))
    ours = torch.stack(outputs, 1).double()
    assert torch.isfinite(ours).all()
    exact = whole(x, weights, heads, *depths, masks, torch.float64)
    plain = whole(x, weights, heads, *depths, masks, dtype).double()
    error, allowed = (ours - exact).norm().item(), (plain - exact).norm().item()
    print(f"{error / allowed:.2f} of {dtype}'s own error, {error / exact.norm().item():.1e} of the result")
    assert error <= 2 * allowed
    return ours


@pytest.mark.parametrize(
    ("dtype", "cache"), [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, FLOAT), (HALF, FLOAT)], ids=str
)
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 16, 17, 40])
def test_dtypes_and_batches(batch, dtype, cache):
    check(12, batch=batch, dtype=dtype, cache=cache, patterns=((1,), (2,)))


@pytest.mark.parametrize("depths", [(8, 8), (8, 256), (256, 8), (24, 40), (64, 64), (64, 128), (128, 200)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_depths(depths, dtype):
    check(40, heads=3, depths=depths, dtype=dtype)


@pytest.mark.parametrize(("width", "hidden"), [(8, 8), (8, 2048), (256, 512), (520, 264), (1024, 4096)])
def test_widths(width, hidden):
    check(6, batch=5, width=width, hidden=hidden, blocks=2)
    check(6, batch=5, width=width, hidden=hidden, blocks=2, dtype=FLOAT)


@pytest.mark.parametrize(
    "patterns", [((1, 1),), ((3, 0, 2),), ((1,), (2,), (1, 2)), ((0,),), ((4, 1, 1, 2, 3), (1,))], ids=str
)
@pytest.mark.parametrize("heads", [1, 2, 5, 8])
def test_programs(patterns, heads):
    check(20, heads=heads, blocks=5, patterns=patterns)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 8), (20, 8)])
def test_many_keys(batch, heads):
    """A head's softmax is in parts, of as many thread blocks; of the last shape in one, on most cards."""
    check(700, batch=batch, heads=heads, blocks=2, patterns=((2,),))


def test_as_many_programs_as_there_may_be():
    check(70, heads=48, blocks=2, depths=(8, 8), patterns=((1,) * 48,))


def test_same_bits_every_time():
    outputs = [check(300, batch=3, heads=2, patterns=((3,), (1, 1))) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_refusals():
    weights = torch_decode.random_weights(1, 32, 32, 2, 16, 264, BFLOAT)
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    decode = torch_decode.Decode(weights, 1, 2, 16, 264, [[[(1, 1)]]], BFLOAT)
    with pytest.raises(RuntimeError, match="depths must be 256 or less"):
        decode(torch.zeros(1, 32, dtype=BFLOAT, device="cuda"), nothing, nothing)
    weights = torch_decode.random_weights(1, 32, 32, 2, 16, 16, BFLOAT)
    decode = torch_decode.Decode(weights, 1, 2, 16, 16, [[[(1, 1)] * 49]], BFLOAT)
    with pytest.raises(RuntimeError, match="48 programs and parts"):
        decode(torch.zeros(1, 32, dtype=BFLOAT, device="cuda"), nothing, nothing)
