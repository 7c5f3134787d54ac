"""The CUDA kernels against float64 mathematics, through their C entry points. Needs PyTorch, nvcc and an NVIDIA GPU.

The error's norm is at most twice that of the same maths by PyTorch in that dtype, its largest element three times.
"""

import functools
import importlib.util
import math
import operator
import pathlib
import sys

import numpy as np
import pytest
from paper_sets import segment_ids, within_documents

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

_PATH = pathlib.Path(__file__).parents[2] / "custom_ops" / "attention" / "torch" / "binding.py"
_SPEC = importlib.util.spec_from_file_location("torch_binding", _PATH)
torch_binding = sys.modules["torch_binding"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(torch_binding)
patterns = torch_binding.import_patterns()

Causal, Local, Strided, OwnBlock = patterns.Causal, patterns.Local, patterns.Strided, patterns.OwnBlock
Summary, Blocks, PerHead, Fixed = patterns.Summary, patterns.Blocks, patterns.PerHead, patterns.Fixed
Sink = patterns.Sink

HEADS = 3


@pytest.fixture(autouse=True, params=["", "sm80", "sm86"], ids=["best", "sm80", "sm86"])
def kernels(request, monkeypatch):
    """The card's best kernels, those that every card runs, and those with tiles for less shared memory."""
    monkeypatch.setenv("STF_CUDA_KERNELS", request.param)
    return request.param


def blocks(n, size, seed=0, heads=None):
    count = -(-n // size)
    shape = [count, count] if heads is None else [heads, count, count]
    layout = np.random.default_rng(seed).random(shape) < 0.4
    return Blocks(np.tril(layout), size)


PATTERNS = {
    "causal": lambda n: Causal(),
    "local": lambda n: Local(37),
    "local 0": lambda n: Local(0),
    "local 128": lambda n: Local(128),
    "strided 128": lambda n: Strided(128),
    "strided 7": lambda n: Strided(7),
    "strided 2": lambda n: Strided(2),
    "strided beyond": lambda n: Strided(100_000),
    "own block": lambda n: OwnBlock(24),
    "own block large": lambda n: OwnBlock(200),
    "summary": lambda n: Summary(32, 8),
    "summary head 0": lambda n: Summary(50, 7, sub_block=0),
    "merged strided": lambda n: Local(20) | Strided(20),
    "two strides": lambda n: Strided(6) | Strided(10),
    "merged fixed": lambda n: Fixed(32, 8),
    "blocks": lambda n: blocks(n, 16),
    "blocks of 5, a layout a head": lambda n: blocks(n, 5, seed=1, heads=HEADS),
    "everything": lambda n: blocks(n, 16) | Local(9) | Strided(11) | Summary(30, 4, sub_block=1) | OwnBlock(13),
    "a pattern a head": lambda n: PerHead([Local(20), Strided(20), Fixed(20, 5)]),
}


def of_each_head(x, heads):
    """Keys or values with as many heads as queries."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def of_documents(ids):
    """What stf_problem says of documents, int32 `[batch, n, 2]`, from segment ids `[batch, n]`."""
    bounds = np.zeros((*ids.shape, 2), np.int32)
    for row, of_row in zip(ids, bounds, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for begin, end in zip(edges, edges[1:], strict=False):
            place = np.arange(begin, end)
            of_row[begin:end] = [begin, end] if row[begin] >= 0 else np.stack([place + 1, place], -1)
    return bounds


def reference(query, key, value, mask, lengths, scale, dtype, sinks=None):
    """Output and log-sum-exp by dense mathematics in `dtype`."""
    query, key, value = (x.to(dtype) for x in (query, key, value))
    key, value = (of_each_head(x, query.shape[2]) for x in (key, value))
    score = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    allowed = mask if mask.dim() == 4 else mask[None]
    if lengths is not None:
        used = torch.arange(mask.shape[-1], device=mask.device)[None] < lengths[:, None]
        allowed = allowed & used[:, None, :, None] & used[:, None, None, :]
    if sinks is not None:  # a key of its own, with value 0
        sink = sinks.to(dtype)[None, :, None, None].expand(*score.shape[:3], 1)
        score = torch.cat([score.masked_fill(~allowed, -torch.inf), sink], -1)
        log_sum_exp = torch.logsumexp(score, -1)
        weight = torch.exp(score - log_sum_exp[..., None])[..., :-1]
        return torch.einsum("bhij,bjhd->bihd", weight, value), log_sum_exp
    empty = ~allowed.any(-1)
    score = score.masked_fill(~allowed, -torch.inf).masked_fill(empty[..., None], 0)
    log_sum_exp = torch.logsumexp(score, -1)
    weight = torch.exp(score - log_sum_exp[..., None]).masked_fill(empty[..., None], 0)
    return torch.einsum("bhij,bjhd->bihd", weight, value), log_sum_exp.masked_fill(empty, -torch.inf)


def gradients(query, key, value, mask, lengths, scale, dtype, output_grad, sum_grad, sinks=None):
    leaves = [x.to(dtype).detach().requires_grad_() for x in (query, key, value)]
    output, log_sum_exp = reference(*leaves, mask, lengths, scale, dtype, sinks)
    loss = (output * output_grad.to(dtype)).sum()
    if sum_grad is not None:
        loss = loss + (log_sum_exp.masked_fill(torch.isinf(log_sum_exp), 0) * sum_grad.to(dtype)).sum()
    return [output.detach(), log_sum_exp.detach(), *torch.autograd.grad(loss, leaves)]


def spelled_out(query, key, value, mask, lengths, scale, dtype, output_grad, sum_grad, sinks=None):
    """`gradients` by the formulas of a backward pass that keeps output and log-sum-exp alone, in `dtype`."""
    output, log_sum_exp = reference(query, key, value, mask, lengths, scale, dtype, sinks)
    query, key, value, output_grad = (x.to(dtype) for x in (query, key, value, output_grad))
    shared = query.shape[2] // key.shape[2]
    key, value = (of_each_head(x, query.shape[2]) for x in (key, value))
    mask = mask if mask.dim() == 4 else mask[None]
    score = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    weight = torch.exp(score - log_sum_exp[..., None]).masked_fill(~mask, 0).nan_to_num(0, 0, 0)
    if lengths is not None:
        used = torch.arange(mask.shape[-1], device=mask.device)[None] < lengths[:, None]
        weight = weight * used[:, None, :, None] * used[:, None, None, :]
    delta = (output_grad * output).sum(-1).transpose(1, 2)
    if sum_grad is not None:
        delta = delta - sum_grad.to(dtype)
    score_grad = weight * (torch.einsum("bihd,bjhd->bhij", output_grad, value) - delta[..., None]) * scale
    return [
        output,
        log_sum_exp,
        torch.einsum("bhij,bjhd->bihd", score_grad, key),
        torch.einsum("bhij,bihd->bjhd", score_grad, query).unflatten(2, (-1, shared)).sum(3),
        torch.einsum("bhij,bihd->bjhd", weight, output_grad).unflatten(2, (-1, shared)).sum(3),
    ]


def run(attention, query, key, value, output_grad, sum_grad):
    """Outputs and gradients of the kernels, into poisoned memory."""
    batch, n, heads, _ = query.shape
    poison = [torch.full_like(x, torch.nan) for x in (output_grad, query, key, value)]
    log_sum_exp = torch.full([batch, heads, n], torch.nan, device="cuda")
    attention.forward(query, key, value, poison[0], log_sum_exp)
    attention.backward(query, key, value, poison[0], log_sum_exp, output_grad, sum_grad, *poison[1:])
    torch.cuda.synchronize()
    return [poison[0], log_sum_exp, *poison[1:]]


def check(
    pattern,
    n,
    dtype=torch.bfloat16,
    depths=(64, 64),
    batch=2,
    heads=HEADS,
    with_lengths=False,
    with_sum_grad=True,
    scale=None,
    pad=0,
    compared=None,
    ids=None,
    restart=False,
    key_heads=None,
    with_sinks=False,
):
    """Outputs and gradients, written twice, beside float64: of all sequences, or of those that are `compared`."""
    key_heads = heads if key_heads is None else key_heads
    torch.manual_seed(n + sum(depths))
    torch.backends.cuda.matmul.allow_tf32 = False
    widths = ((heads, depths[0]), (key_heads, depths[0]), (key_heads, depths[1]), (heads, depths[1]))
    shapes = [[batch, n, count, depth + pad] for count, depth in widths]
    tensors = [torch.randn(shape, device="cuda").to(dtype)[..., : shape[-1] - pad] for shape in shapes]
    query, key, value, output_grad = tensors
    sum_grad = torch.randn(batch, heads, n, device="cuda") if with_sum_grad else None
    lengths = torch.tensor([n // 3, n][:batch], dtype=torch.int32, device="cuda") if with_lengths else None
    scale = 1 / math.sqrt(depths[0]) if scale is None else scale
    mask = np.stack([pattern.mask(n, head) for head in range(heads)])
    mask = torch.from_numpy(mask if ids is None else within_documents(mask, ids, restart)).cuda()
    documents = None if ids is None else torch.from_numpy(of_documents(ids)).cuda()
    sinks = torch.randn(heads, device="cuda") if with_sinks else None

    attention = torch_binding.Attention(query, value, pattern, lengths, scale, documents, restart, sinks)
    padded = [x.clone() if with_lengths else x for x in (query, key, value, output_grad)]
    if with_lengths:  # what lies beyond is nobody's business
        for x in padded:
            for row, length in zip(x, lengths.tolist(), strict=True):
                row[length:] = torch.nan
    ours = whole = run(attention, *padded, sum_grad)
    again = run(attention, *padded, sum_grad)
    if compared is not None:
        query, key, value, output_grad = (x[compared] for x in tensors)
        ours = [x[compared] for x in ours]
        sum_grad = None if sum_grad is None else sum_grad[compared]
    arguments = query, key, value, mask, lengths, scale
    upstream = output_grad, sum_grad, sinks
    exact = gradients(*arguments, torch.float64, *upstream)
    peers = [maths(*arguments, dtype, *upstream) for maths in (gradients, spelled_out)]
    names = ("output", "log_sum_exp", "query_grad", "key_grad", "value_grad")
    for name, x, y, *plain in zip(names, ours, exact, *peers, strict=True):
        assert not torch.isnan(x).any(), f"{name}: {torch.isnan(x).sum()} of {x.numel()} are NaN"
        assert torch.equal(torch.isinf(x), torch.isinf(y)), f"{name}: infinities"
        errors = [(a.double() - y).masked_fill(torch.isinf(y), 0) for a in (x, *plain)]
        # Where PyTorch happens to be exact, a rounding of the largest element.
        rounding = torch.finfo(dtype).eps * y.masked_fill(torch.isinf(y), 0).abs().max().item()
        for norm, most in ((torch.linalg.vector_norm, 2), (lambda e: e.abs().max(), 3)):
            error, *allowed = (norm(e).item() for e in errors)
            assert error <= max(most * max(allowed), rounding), f"{name}: error {error:.3g}, PyTorch's {allowed}"
    for x, y in zip(whole, again, strict=True):
        assert torch.equal(x, y), "another run gave other bits"


@pytest.mark.parametrize("n", [1, 37, 128, 389])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name, n):
    check(PATTERNS[name](n), n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_dtypes(name, dtype):
    check(PATTERNS[name](389), 389, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "depths", [(32, 32), (64, 128), (128, 128), (256, 256), (8, 24), (40, 96), (64, 200), (7, 5), (1, 256)], ids=str
)
@pytest.mark.parametrize("name", ["causal", "everything", "strided 7", "strided 128", "merged fixed"])
def test_depths(name, depths, dtype):
    check(PATTERNS[name](205), 205, dtype, depths)


@pytest.mark.parametrize("name", PATTERNS)
def test_lengths(name):
    check(PATTERNS[name](205), 205, with_lengths=True)
    check(PATTERNS[name](205), 205, torch.float32, with_lengths=True)


@pytest.mark.parametrize("length", [1, 24, 31, 32, 33, 64, 65, 96, 97, 128, 129])
def test_packed_lengths(length):
    for dtype in (torch.float32, torch.bfloat16):
        check(Strided(5), 5 * length - 2, dtype)
        check(Local(5) | Strided(5), 5 * length - 3, dtype)
        check(OwnBlock(length), 5 * length - length // 2, dtype)
        check(OwnBlock(length) | Strided(length), 3 * length, dtype)


# Patterns whose backward pass is one launch on Hopper: windows of a few tiles, sequences of a few; many runs of keys,
# keys that reach the most tiles that there are sums for, and a tile more; strided components that begin tiles behind
# their query.
ONE_PASS = [
    (lambda: Local(128), 6000, (64, 128)),
    (lambda: Local(129), 1500, (64, 128)),
    (lambda: Local(130), 1500, (64, 128)),
    (lambda: Local(63), 1024, (64, 64)),
    (lambda: Local(256), 2000, (64, 64)),
    (lambda: Local(258), 2000, (40, 64)),
    (lambda: Local(1024), 3000, (32, 32)),
    (lambda: Local(1100), 3000, (16, 24)),
    (lambda: Strided(8), 2047, (64, 64)),
    (lambda: Strided(3), 3072, (32, 32)),
    (lambda: Local(300) | Strided(4), 2000, (32, 32)),
    (lambda: Local(600) | Strided(4), 2400, (32, 32)),
    (lambda: OwnBlock(200), 900, (64, 128)),
    (lambda: OwnBlock(900), 2000, (32, 32)),
    (lambda: PerHead([Local(20), Local(100), Local(128)]), 900, (64, 128)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", range(len(ONE_PASS)))
def test_backward_in_one_pass(case, dtype):
    pattern, n, depths = ONE_PASS[case]
    check(pattern(), n, dtype, depths)
    check(pattern(), n, dtype, depths, with_lengths=True, with_sum_grad=False)


@pytest.mark.parametrize(
    ("pattern", "n", "batch"), [(Local(20) | Strided(4), 4600, 44), (Strided(3), 1536, 120)], ids=str
)
def test_blocks_of_threads_with_many_runs(pattern, n, batch):
    """Statistics of one run's queries take the place of those of runs before, once nobody reads them any more."""
    check(pattern, n, depths=(32, 32), batch=batch, compared=[0, batch // 2, batch - 1])


@pytest.mark.parametrize(
    ("pattern", "depths"),
    [(Local(128), (64, 128)), (Strided(128), (64, 128)), (Local(20) | Strided(8), (32, 32))],
    ids=str,
)
def test_the_same_bits_in_twenty_runs(pattern, depths):
    torch.manual_seed(0)
    tensors = [
        torch.randn(4, 3072, HEADS, depth, device="cuda").bfloat16() for depth in (*depths[:1] * 2, *depths[1:] * 2)
    ]
    attention = torch_binding.Attention(tensors[0], tensors[2], pattern)
    first = run(attention, *tensors, None)
    for _ in range(19):
        for x, y in zip(first, run(attention, *tensors, None), strict=True):
            assert torch.equal(x, y), "another run gave other bits"


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
@pytest.mark.parametrize("n", [37, 389])
@pytest.mark.parametrize("name", PATTERNS)
def test_documents(name, n, restart):
    check(PATTERNS[name](n), n, ids=segment_ids(n, 2), restart=restart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_documents_and_all_else(name, dtype):
    """Lengths, sinks and a key and value of all heads too."""
    more = {"with_lengths": True, "with_sinks": True, "key_heads": 1}
    for restart in (False, True):
        check(PATTERNS[name](205), 205, dtype, (64, 32), ids=segment_ids(205, 2, 1), restart=restart, **more)


@pytest.mark.parametrize("case", range(len(ONE_PASS)))
def test_documents_backward_in_one_pass(case):
    pattern, n, depths = ONE_PASS[case]
    check(pattern(), n, depths=depths, ids=segment_ids(n, 2))
    check(pattern(), n, depths=depths, ids=segment_ids(n, 2, 1), key_heads=1, with_sinks=True, restart=True)


@pytest.mark.parametrize("first", [3, 1000])
@pytest.mark.parametrize("pattern", [OwnBlock(64), OwnBlock(20), blocks(2048, 16)], ids=["own 64", "own 20", "blocks"])
def test_blocks_of_a_document_that_strides_leave_out(pattern, first):
    """Of two launches: that of the strides leaves out what counts from the document, also in its last tiles."""
    ids = np.stack([np.arange(2048) >= first, np.zeros(2048, int)]).astype(np.int32)
    for dtype in (torch.bfloat16, torch.float32):
        check(pattern | Strided(8), 2048, dtype, (32, 32), ids=ids, restart=True)


@pytest.mark.parametrize("length", [1, 24, 32, 33, 64, 65, 96, 128, 129])
def test_documents_in_packed_sequences(length):
    for dtype in (torch.float32, torch.bfloat16):
        n = 5 * length - 2
        check(Strided(5), n, dtype, ids=segment_ids(n, 2))
        check(OwnBlock(length), n, dtype, ids=segment_ids(n, 2), with_lengths=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("depths", [(32, 32), (64, 64), (64, 128), (7, 5), (256, 256)], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 3])
def test_key_heads(key_heads, depths, dtype):
    for name in ("causal", "local 128", "strided 7", "own block", "merged fixed", "everything"):
        if name != "everything":
            check(PATTERNS[name](300), 300, dtype, depths, heads=6, key_heads=key_heads)
    check(PATTERNS["everything"](300), 300, dtype, depths, key_heads=1)


@pytest.mark.parametrize("name", PATTERNS)
def test_sinks(name):
    for dtype in (torch.bfloat16, torch.float32):
        check(PATTERNS[name](205), 205, dtype, with_sinks=True, with_lengths=True)


@pytest.mark.parametrize("size", [1, 4, 7, 64, 200])
def test_first_positions(size):
    for depths in ((32, 32), (64, 64), (64, 128)):
        check(Sink(size), 300, depths=depths)
        check(Local(30) | Sink(size), 300, depths=depths)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_scales(scale):
    for name in ("causal", "merged strided"):
        check(PATTERNS[name](150), 150, torch.float32, scale=scale)
        check(PATTERNS[name](150), 150, torch.bfloat16, scale=scale)


@pytest.mark.parametrize("columns", [1, 2, 3, 6, 20, 64, 96])
def test_summaries(columns):
    """However many of its rows lie together."""
    for depths in ((32, 32), (64, 64), (64, 128)):
        check(Fixed(2 * columns, columns), 8 * columns + 3, depths=depths)
        check(Summary(5 * columns, columns, sub_block=0), 300, depths=depths)


@pytest.mark.parametrize("n", [5, 26, 27, 28, 31])
def test_summaries_cut_by_the_end(n):
    """The stride exceeds n, so that a summary has fewer columns than elsewhere: an odd number too."""
    for dtype in (torch.bfloat16, torch.float16):
        check(Fixed(32, 8), n, dtype, (32, 32))
        check(Summary(32, 8), n, dtype, (32, 32))
        check(Local(3) | Summary(32, 6, sub_block=0), n, dtype, (24, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("strides", "most"), [([20], 1.3), ([2, 3, 5, 7, 11, 13, 17, 19, 23, 29], 1.1)], ids=["2", "11"]
)
def test_an_output_of_many_launches_is_rounded_once(strides, most, dtype):
    """Beside one launch with the same keys. Of two launches the second begins with a rounded output, which was measured
    to be 1.2 times as far from float64."""
    n = 700
    pattern = functools.reduce(operator.or_, [Strided(stride) for stride in strides], Local(1))
    mask = pattern.mask(n, 0)
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(2, n, HEADS, 64, device="cuda").to(dtype) for _ in range(4))
    whole = torch.from_numpy(mask).cuda().expand(HEADS, n, n)
    exact, _ = reference(query, key, value, whole, None, 1 / 8, torch.float64)
    errors = []
    for each in (pattern, Blocks(mask, 1)):
        output, *_ = run(torch_binding.Attention(query, value, each), query, key, value, grad, None)
        errors.append(torch.linalg.vector_norm(output.double() - exact).item())
    assert errors[0] <= most * errors[1]


def test_without_gradient_of_the_sums():
    check(Causal(), 100, with_sum_grad=False)


@pytest.mark.parametrize("pad", [1, 8])
def test_strides(pad):
    """Rows that lie apart, also where they are not aligned to 16 bytes."""
    for name in ("causal", "merged strided", "summary"):
        check(PATTERNS[name](150), 150, pad=pad)
        check(PATTERNS[name](150), 150, torch.float32, pad=pad)


def test_many_programs():
    """More programs than a launch has room for."""
    pattern = PerHead(
        [Local(h) | Summary(40 + h, 3, sub_block=0) | Blocks(np.eye(15, dtype=bool), 10) for h in range(50)]
    )
    check(pattern, 150, batch=1, heads=60)


@pytest.mark.parametrize("shape", [(2, 0, 3, 64), (0, 4, 3, 64), (2, 4, 0, 64)], ids=str)
def test_nothing_to_do(shape):
    query = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    attention = torch_binding.Attention(query, query, Causal()) if shape[2] else no_heads(query)
    run(attention, query, query, query, query, None)


def no_heads(query):
    """A call as stf's op makes it of no heads: without a program."""
    attention = torch_binding.Attention(torch.zeros(2, 4, 1, 64, device="cuda", dtype=query.dtype), query, Causal())
    attention._problem.heads = attention._problem.programs = 0
    return attention


def test_refusals():
    query = torch.zeros(1, 4, 1, 264, device="cuda", dtype=torch.bfloat16)
    attention = torch_binding.Attention(query, query, Causal())
    with pytest.raises(RuntimeError, match="invalid argument"):
        run(attention, query, query, query, query, None)


def test_kernels_that_are_none_are_refused(monkeypatch):
    monkeypatch.setenv("STF_CUDA_KERNELS", "hopper")
    query = torch.zeros(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    attention = torch_binding.Attention(query, query, Causal())
    with pytest.raises(RuntimeError, match="STF_CUDA_KERNELS must be sm80, sm86 or unset"):
        run(attention, query, query, query, query, None)
