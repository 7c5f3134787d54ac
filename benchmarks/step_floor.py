"""The least time of a training step: what its parts must read, write and multiply. NOTES.md has the count in words."""

from typing import NamedTuple


class Part(NamedTuple):
    """A part of the step: bytes of device memory and floating-point operations that it cannot do without."""

    name: str
    bytes: float
    flops: float


class Ceilings(NamedTuple):
    """What the device reached in the same run: bytes read plus written, and bfloat16 operations, a second."""

    copy: float
    matmul: float


def parts(config, batch_size, recompute=False):
    """The parts of a step of the model of a configuration (arguments of `SparseTransformer`), halves throughout.

    Where nothing is recomputed, norms and activations are taken as kept too.

    Each tensor is read once and written once by every part that takes or gives it. Elementwise work between two matrix
    products is one part; biases, dropout's masks and the gradients of biases cost nothing beside it.
    """
    d, heads = config["model_dim"], config["num_heads"]
    key_dim, value_dim = (config.get(name) or d // heads for name in ("key_dim", "value_dim"))
    hidden = config.get("ff_dim") or 4 * d
    n, blocks, vocabulary = config["length"], config["num_blocks"], config.get("vocab_size", 256)
    rows, patterns = batch_size * n, config["patterns"]
    qkv, values = heads * (2 * key_dim + value_dim), heads * value_dim
    flops = {
        backward: [pattern.flops(n, key_dim, value_dim, heads, batch_size, backward=backward) for pattern in patterns]
        for backward in (False, True)
    }
    once, twice = (sum(flops[b][k % len(patterns)] for k in range(blocks)) / blocks for b in (False, True))

    def matmul(name, a, b, times=1):
        return Part(name, 2 * rows * (a + b) * times, 2 * rows * a * b * times)

    def elementwise(name, widths):
        return Part(name, 2 * rows * widths, 0)

    def half_of(part):
        return part._replace(bytes=part.bytes / 2, flops=part.flops / 2)

    forward = [
        elementwise("residual addition and norm, before attention", 4 * d),  # stream, branch -> stream, normalized
        matmul("query, key, value", d, qkv),
        Part("attention", 2 * rows * (qkv + values), once),
        matmul("attention output", values, d),
        elementwise("residual addition and norm, before feed-forward", 4 * d),
        matmul("hidden layer", d, hidden),
        elementwise("activation", 2 * hidden),
        matmul("feed-forward output", hidden, d),
    ]
    # A block's input is kept: of the first part only the norm is computed again.
    norm_again = elementwise("norm, before attention", 2 * d)
    # Of two blocks that are computed again together, the first wholly.
    ends = [half_of(norm_again), half_of(forward[7]), half_of(forward[0])]
    again = {False: [], "attention": [norm_again, forward[1], *forward[3:7]], True: [*ends, *forward[1:7]]}[recompute]
    backward = [
        matmul("feed-forward output, gradients", hidden, d, 2),
        elementwise("activation, gradient", 3 * hidden),  # hidden, its output's gradient -> its gradient
        matmul("hidden layer, gradients", d, hidden, 2),
        elementwise("norm, residual and dropout, gradients, before feed-forward", 5 * d),
        matmul("attention output, gradients", values, d, 2),
        Part("attention, gradient", 2 * rows * (2 * qkv + 2 * values), twice - once),
        matmul("query, key, value, gradients", d, qkv, 2),
        elementwise("norm, residual and dropout, gradients, before attention", 5 * d),
    ]
    recomputed = [part._replace(name=f"{part.name}, again") for part in again]
    of_blocks = [Part(p.name, blocks * p.bytes, blocks * p.flops) for p in (*forward, *recomputed, *backward)]
    weights = blocks * (d * (qkv + hidden) + (values + hidden) * d) + 2 * vocabulary * d
    rest = [
        Part("embedding and its gradient", 2 * rows * 2 * d, 0),
        Part("logits and their gradients", 3 * rows * (2 * d + 4 * vocabulary), 3 * 2 * rows * d * vocabulary),
        Part("loss and its gradient", 4 * rows * 2 * vocabulary, 0),
        # Weight, momentum, velocity and average read and written, gradient read, float32.
        Part("optimizer", 36 * weights, 0),
    ]
    return [*of_blocks, *rest]


def floor(config, batch_size, ceilings, recompute=False):
    """Seconds: each part takes the longer of its bytes and its operations."""
    return sum(
        max(p.bytes / ceilings.copy, p.flops / ceilings.matmul) for p in parts(config, batch_size, recompute=recompute)
    )
