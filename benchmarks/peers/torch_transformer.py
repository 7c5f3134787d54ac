"""The Sparse Transformer in PyTorch, written and compiled as its users do: the peer of stf's training step.

    python benchmarks/peers/torch_transformer.py --kind=strided                     # CIFAR-10 model, one JSON line
    python benchmarks/peers/torch_transformer.py --kind=fixed --model=enwik8 --recompute

Same function, initial values, optimizer and precision as `stf.models.SparseTransformer` under mixed_bfloat16: bfloat16
autocast, float32 weights, a bfloat16 residual stream (`--stream=float32` is what autocast alone gives, and slower).
Blocks are compiled one by one, so that all blocks of a kind share one compilation.
"""

import argparse
import contextlib
import json
import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch_attention import attentions

SUMMARY = 32  # c of fixed attention
MODELS = {
    "cifar10": {
        "length": 3072,
        "batch_size": 16,
        "num_blocks": 128,
        "num_heads": 2,
        "model_dim": 256,
        "key_dim": 64,
        "value_dim": 128,
        "ff_dim": 512,
        "dropout": 0.25,
    },
    "enwik8": {
        "length": 12288,
        "batch_size": 4,
        "num_blocks": 30,
        "num_heads": 8,
        "model_dim": 512,
        "key_dim": 64,
        "value_dim": 64,
        "ff_dim": 2048,
        "dropout": 0.40,
    },
}
PARAMETERS = {"cifar10": 59_196_928, "enwik8": 94_949_888}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Block(nn.Module):
    """Attention and feed-forward, pre-norm."""

    def __init__(self, attention, num_heads, model_dim, key_dim, value_dim, ff_dim, dropout):
        super().__init__()
        self.attention, self.num_heads, self.dropout = attention, num_heads, dropout
        self.widths = [num_heads * key_dim, num_heads * key_dim, num_heads * value_dim]
        self.attention_norm, self.ff_norm = nn.LayerNorm(model_dim), nn.LayerNorm(model_dim)
        self.qkv = nn.Linear(model_dim, sum(self.widths))
        self.projection = nn.Linear(num_heads * value_dim, model_dim)
        self.ff_in, self.ff_out = nn.Linear(model_dim, ff_dim), nn.Linear(ff_dim, model_dim)

    def forward(self, stream):
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1))  # [batch, position, head, depth]
            for x in self.qkv(self.attention_norm(stream)).split(self.widths, -1)
        )
        a = self.projection(self.attention(query, key, value).flatten(2))
        stream = stream + F.dropout(a, self.dropout, self.training)
        hidden = self.ff_in(self.ff_norm(stream))
        b = self.ff_out(hidden * torch.sigmoid(1.702 * hidden))
        return stream + F.dropout(b, self.dropout, self.training)


class SparseTransformer(nn.Module):
    """The whole model; `attention` holds what the blocks take in turn. Its call gives the loss, `logits` the logits."""

    def __init__(
        self,
        length,
        position_shape,
        attention,
        num_blocks,
        num_heads,
        model_dim,
        key_dim,
        value_dim,
        ff_dim,
        dropout,
        vocab_size=256,
        recompute=False,
        stream_dtype=torch.float32,
    ):
        super().__init__()
        if math.prod(position_shape) < length:
            raise ValueError(f"position_shape must cover length={length}. Received: position_shape={position_shape!r}")
        self.recompute, self.stream_dtype = recompute, stream_dtype
        self.tokens = nn.Parameter(torch.empty(vocab_size, model_dim))
        self.start = nn.Parameter(torch.empty(model_dim))
        self.places = nn.ParameterList(torch.empty(size, model_dim) for size in position_shape)
        widths = num_heads, model_dim, key_dim, value_dim, ff_dim
        self.blocks = nn.ModuleList(
            Block(attention[index % len(attention)], *widths, dropout) for index in range(num_blocks)
        )
        self.final_norm = nn.LayerNorm(model_dim)
        self.output = nn.Linear(model_dim, vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """The paper's initial values, read as `stf.layers.paper_initializer` does."""
        width = self.start.shape[-1]
        for x in (self.tokens, self.start):
            x.normal_(std=(0.125 / width) ** 0.5)
        for x in self.places:
            x.normal_(std=(0.125 / (width * len(self.places))) ** 0.5)
        for block in self.blocks:
            for linear in (block.qkv, block.projection, block.ff_in, block.ff_out):
                linear.weight.normal_(std=(0.125 / linear.in_features) ** 0.5)
                linear.bias.zero_()
            for linear in (block.projection, block.ff_out):
                linear.weight.mul_((2 * len(self.blocks)) ** -0.5)
        self.output.weight.zero_()

    def embed(self, tokens):
        places, *others = self.places
        for table in others:
            places = (places[:, None] + table).flatten(0, 1)  # [positions of the axes so far, model_dim]
        shifted = F.embedding(tokens[:, :-1], self.tokens) + places[: tokens.shape[1] - 1]
        return torch.cat([self.start.expand(len(tokens), 1, -1), shifted], 1).to(self.stream_dtype)

    def head(self, stream):
        return self.output(self.final_norm(stream)).float()

    def loss(self, stream, tokens):
        return F.cross_entropy(self.head(stream).flatten(0, 1), tokens.flatten())

    def hidden(self, tokens):
        stream = self.embed(tokens)
        for block in self.blocks:
            stream = checkpoint(block, stream, use_reentrant=False) if self.recompute else block(stream)
        return stream

    def logits(self, tokens):
        return self.head(self.hidden(tokens))

    def forward(self, tokens):
        return self.loss(self.hidden(tokens), tokens)

    def compile_parts(self, **options):
        """Compiles each block, the embedding and the loss, for fixed shapes; a break in a graph is an error."""
        options = {"fullgraph": True, "dynamic": False} | options
        for block in self.blocks:
            block.compile(**options)
        self.embed, self.loss = torch.compile(self.embed, **options), torch.compile(self.loss, **options)


def make(model, kind, stride=128, device="cuda", recompute=False, stream_dtype=torch.float32, **sizes):
    """The model of a name in `MODELS`, with any size set otherwise."""
    config = MODELS[model] | {name: size for name, size in sizes.items() if size is not None}
    config.pop("batch_size")
    length = config["length"]
    shape = (math.ceil(length / 96), 32, 3) if model == "cifar10" else (math.ceil(length / 128), 128)
    config["attention"] = attentions(kind, length, config["num_heads"], stride, SUMMARY, device)
    with torch.device(device):
        return SparseTransformer(position_shape=shape, recompute=recompute, stream_dtype=stream_dtype, **config)


def make_optimizer(model, **options):
    """AdamW of the paper's recipe; what has two or more dimensions decays."""
    decays = [x for x in model.parameters() if x.ndim >= 2]
    others = [x for x in model.parameters() if x.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3.5e-4, betas=(0.9, 0.999), **options)


def training_step(network, optimizer, tokens):
    """One step; returns the loss, on the device."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        loss = network(tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def measure(
    kind,
    model="cifar10",
    length=None,
    batch_size=None,
    num_blocks=None,
    recompute=False,
    steps=12,
    warmup=4,
    stride=128,
    stream="bfloat16",
    sdpa="auto",
    mode=None,
):
    """Times training steps on the GPU.

    Args:
        kind: "strided" (local and strided in turn), "fixed" or "dense".
        model: a name in `MODELS`, whose `length`, `batch_size` and `num_blocks` hold unless given.
        recompute: keep one residual a block and compute the rest again in the backward pass.
        steps, warmup: timed steps, and steps before them.
        stride: l.
        stream: dtype of the residual stream.
        sdpa: the back end that SDPA tries first, of `BACKENDS`; "auto" leaves the choice to PyTorch.
        mode: of `torch.compile`.

    Returns:
        A dictionary. build_s: weights and block masks, made before the first step. first_call_s: that step, compilation
        included. ms: median of the timed steps. host_ms: the same until the host had launched the step. peak_GiB: most
        memory allocated in the timed steps, weights and optimizer included. loss: of the last step.
    """
    torch.manual_seed(0)
    length, batch_size = length or MODELS[model]["length"], batch_size or MODELS[model]["batch_size"]
    tokens = torch.randint(256, (batch_size, length), device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    sizes = {"length": length, "num_blocks": num_blocks}
    network = make(model, kind, stride, recompute=recompute, stream_dtype=getattr(torch, stream), **sizes)
    network.compile_parts(mode=mode)
    optimizer = make_optimizer(network, fused=True)
    torch.cuda.synchronize()
    built = time.perf_counter()
    first = [BACKENDS[sdpa]] if sdpa != "auto" else []
    with sdpa_kernel([*first, *BACKENDS.values()], set_priority=True) if first else contextlib.nullcontext():
        training_step(network, optimizer, tokens).item()
        torch.cuda.synchronize()
        called = time.perf_counter()
        for _ in range(warmup - 1):
            training_step(network, optimizer, tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times, host = [], []
        for _ in range(steps):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            start = time.perf_counter()
            events[0].record()
            loss = training_step(network, optimizer, tokens)
            events[1].record()
            host.append(1e3 * (time.perf_counter() - start))
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"loss is {loss.item()}")
    ms = statistics.median(times)
    return {
        "first_call_s": called - built,
        "build_s": built - begin,
        "ms": ms,
        "host_ms": statistics.median(host),
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "tokens_per_s": 1e3 * tokens.numel() / ms,
        "parameters": sum(x.numel() for x in network.parameters()),
        "loss": loss.item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["strided", "dense", "fixed"], default="strided")
    parser.add_argument("--model", choices=sorted(MODELS), default="cifar10")
    for name in ("length", "batch_size", "num_blocks"):
        parser.add_argument(f"--{name}", type=int, help="the model's unless given")
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--stream", choices=["bfloat16", "float32"], default="bfloat16", help="of the residual stream")
    parser.add_argument("--sdpa", choices=["auto", *BACKENDS], default="auto", help="what SDPA tries first")
    parser.add_argument("--mode", help="of torch.compile, such as max-autotune-no-cudagraphs")
    options = vars(parser.parse_args())
    result = measure(**options)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({"implementation": "torch"} | options | result | machine), flush=True)


if __name__ == "__main__":
    main()
