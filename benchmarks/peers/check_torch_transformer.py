"""Checks the PyTorch peer on a CPU: parameters, what each kind attends to, and that no position sees its own token.

    python benchmarks/peers/check_torch_transformer.py

FlexAttention runs uncompiled here, and without its gradient, which a CPU has not.
"""

import torch
import torch_transformer
from torch_attention import attentions

LENGTH, HEADS, STRIDE, SUMMARY = 256, 6, 32, 8


def pairs(kind, index, head):
    """Whether query i sees key j, `[n, n]`, one pair after another, from the paper's definitions."""
    l, c = STRIDE, SUMMARY
    end = l - c * (head % (l // c))
    sees = {
        ("strided", 0): lambda i, j: i - l <= j,
        ("strided", 1): lambda i, j: (i - j) % l == 0,
        ("fixed", 0): lambda i, j: i // l == j // l or end - c <= j % l < end,
        ("dense", 0): lambda i, j: True,
    }[kind, index]
    return torch.tensor([[j <= i and sees(i, j) for j in range(LENGTH)] for i in range(LENGTH)])


def check_attention(kind):
    """Output and, but for FlexAttention, gradients, against softmax over the masked scores."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, LENGTH, HEADS, 24) for _ in range(2))
    value, grad = (torch.randn(2, LENGTH, HEADS, 40) for _ in range(2))
    for index, attend in enumerate(attentions(kind, LENGTH, HEADS, STRIDE, SUMMARY, "cpu")):
        mask = torch.stack([pairs(kind, index, head) for head in range(HEADS)])

        def reference(query, key, value, mask=mask):
            scores = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
            return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)

        found, expected, what = [attend(query, key, value)], [reference(query, key, value)], "output"
        if attend.__qualname__.split(".")[0] != "flex":
            leaves = [x.requires_grad_() for x in (query, key, value)]
            found += torch.autograd.grad(attend(*leaves), leaves, grad)
            expected += torch.autograd.grad(reference(*leaves), leaves, grad)
            query, key, value = (x.detach() for x in leaves)
            what = "output and gradients"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        print(f"{kind}, attention {index}: {what} right")


@torch.no_grad()
def check_causality(kind):
    """Logits of positions up to t do not depend on token t, and those after it do."""
    torch.manual_seed(0)
    network = torch_transformer.make("cifar10", kind, STRIDE, "cpu", length=192, num_blocks=2).eval()
    network.output.weight.normal_()
    tokens = torch.randint(256, (1, 192))
    changed = tokens.clone()
    changed[0, 100] = (tokens[0, 100] + 1) % 256
    differs = (network.logits(tokens) != network.logits(changed)).any(-1)[0]
    assert not differs[:101].any() and differs[101], kind


def main():
    for model, expected in torch_transformer.PARAMETERS.items():
        network = torch_transformer.make(model, "dense", device="meta")
        count = sum(x.numel() for x in network.parameters())
        assert count == expected, f"{model}: {count:,} parameters instead of {expected:,}"
        print(f"{model}: {count:,} parameters")
    for kind in ("strided", "fixed", "dense"):
        check_attention(kind)
        check_causality(kind)


if __name__ == "__main__":
    main()
