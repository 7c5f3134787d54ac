"""Generation in PyTorch as its users write it: dense attention over a cache of all positions. The peer of generate.py.

    python benchmarks/peers/torch_generate.py '{"num_blocks": 2, "num_heads": 2, "model_dim": 64, "key_dim": 32,
        "value_dim": 32, "ff_dim": 256, "length": 3072, "batch": 8, "begin": 0}'

Pre-norm blocks of the same sizes; keys and values of all positions in one tensor a block, written in place;
scaled_dot_product_attention over all of them, those to come masked; one step compiled, in float32, on a CPU; on a GPU
the blocks compiled, in bfloat16, and a step one CUDA graph; draws by torch.multinomial. Prints milliseconds a token.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

CALL, CALLS = 64, 10


class Block(nn.Module):
    """Attention over a cache, and feed-forward."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.key_dim, self.value_dim = c["num_heads"], c["key_dim"], c["value_dim"]
        width = c["model_dim"]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, self.heads * (2 * self.key_dim + self.value_dim))
        self.combine = nn.Linear(self.heads * self.value_dim, width)
        self.hidden, self.output = nn.Linear(width, c["ff_dim"]), nn.Linear(c["ff_dim"], width)
        shape = c["batch"], self.heads, c["length"]
        self.register_buffer("keys", torch.zeros(*shape, self.key_dim))
        self.register_buffer("values", torch.zeros(*shape, self.value_dim))

    def forward(self, x, position, mask):
        parts = self.qkv(self.norms[0](x)).split(
            [self.heads * d for d in (self.key_dim, self.key_dim, self.value_dim)], -1
        )
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, value)
        attended = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask)
        x = x + self.combine(attended.transpose(1, 2).flatten(2))
        hidden = self.hidden(self.norms[1](x))
        return x + self.output(hidden * torch.sigmoid(1.702 * hidden))


class Model(nn.Module):
    """Tokens and places, blocks, logits."""

    def __init__(self, c):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, c["model_dim"]), nn.Embedding(c["length"], c["model_dim"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["num_blocks"]))
        self.norm, self.logits = nn.LayerNorm(c["model_dim"]), nn.Linear(c["model_dim"], 256, bias=False)
        self.register_buffer("order", torch.arange(c["length"]))

    def forward(self, token, position):
        x = self.tokens(token)[:, None] + self.places(position)
        mask = (self.order <= position)[None, None, None]
        for block in self.blocks:
            x = block(x, position, mask)
        probabilities = self.logits(self.norm(x))[:, 0].float().softmax(-1)
        return torch.multinomial(probabilities, 1)[:, 0]


def graph_of(model, token, position):
    """One step as a CUDA graph; `token` and `position` are its inputs from then on."""
    for block in model.blocks:
        block.compile()
    for _ in range(3):
        model(token, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = model(token, position)

    def step(new_token, new_position):
        token.copy_(new_token)
        position.copy_(new_position)
        graph.replay()
        return drawn

    return step


@torch.inference_mode()
def main():
    config = json.loads(sys.argv[1])
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.set_num_threads(2 if not gpu else torch.get_num_threads())
    model = Model(config).to(device, dtype)
    token = torch.zeros(config["batch"], dtype=torch.long, device=device)
    position, times = torch.tensor([config["begin"]], device=device), []
    step = graph_of(model, token, position) if gpu else torch.compile(model)
    for _ in range(3):  # compiles
        token = step(token, position).clone()
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        count = min(CALL, config["length"] - 1 - int(position))
        for _ in range(count):
            token = step(token, position).clone()
            position += 1
        if gpu:
            torch.cuda.synchronize()
        if count:
            times.append((time.perf_counter() - start) / count)
    print(json.dumps({"ms": 1e3 * min(times), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
