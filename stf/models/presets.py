"""Named configurations. Behind each value stands where it is from.

P: the paper. F: the authors' follow-up code. D: derived from their numbers. C: chosen here.

`python -m stf.models.presets` prints them as a table.
"""

import copy
from typing import Any

from stf.layers.validation import positive
from stf.patterns import Causal, Fixed, Local, Strided

_CIFAR10 = {
    "length": 3072,  # P: 32 x 32 x 3 bytes
    "position_shape": (32, 32, 3),  # P: row, column, channel
    "patterns": [Local(96), Strided(96)],  # P: strided, alternating (Eq. 6); F: l = 96, one image row
    "num_blocks": 128,  # P
    "num_heads": 2,  # P
    "model_dim": 256,  # P
    "key_dim": 64,  # P: half-size, d / 2 over both heads
    "value_dim": 128,  # D: d over both heads
    "ff_dim": 512,  # P: half-size, 2 d
    "dropout": 0.25,  # P
    "recompute": True,  # P
}
_ENWIK8 = {
    "length": 12288,  # P
    "position_shape": (96, 128),  # P: attention embedding, rows of l
    "patterns": [Fixed(128, 32)],  # P: fixed, merged (Eq. 7), l = 128, c = 32, a sub-block of its own for each head
    "num_blocks": 30,  # P
    "num_heads": 8,  # P
    "model_dim": 512,  # P
    "dropout": 0.40,  # P
    "recompute": True,  # P
}
_IMAGENET64 = {
    "length": 12288,  # P: 64 x 64 x 3 bytes
    "position_shape": (64, 64, 3),  # P: row, column, channel
    "patterns": [Local(128), Strided(128)],  # P: strided, l = 128
    "num_blocks": 48,  # P
    "num_heads": 16,  # P
    "model_dim": 512,  # P
    "dropout": 0.01,  # P
    "recompute": True,  # P
}
_AUDIO = {
    "dropout": 0.0,  # C: not given; a model sees its hours of music few times
    "recompute": True,  # P
}

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": _CIFAR10,
    "cifar10-dense": _CIFAR10 | {"patterns": [Causal()]},  # P: Table 2
    "cifar10-fixed": _CIFAR10 | {"patterns": [Fixed(128, 32)]},  # P: Table 2; C: l and c as for text
    "cifar10-augmented": _CIFAR10
    | {
        "num_blocks": 82,  # C: 150M parameters (F), with heads of cifar10's depths
        "num_heads": 4,  # C
        "model_dim": 512,  # C
        "ff_dim": 1024,  # C: half-size as cifar10's
        "conditions": (2, 4, 6),  # F: transpositions, rotations, orders of the colours, each told to the model
    },
    "cifar10-released": _CIFAR10 | {"patterns": [Local(96)] * 3 + [Strided(96)]},  # F: 3 local to 1 strided
    "cifar10-small": {
        "length": 3072,  # P
        "position_shape": (32, 32, 3),  # P
        "patterns": [Local(96), Strided(96)],  # P, F
        "num_blocks": 2,  # C: trains on two CPU cores within minutes, as all below
        "num_heads": 2,  # P
        "model_dim": 64,  # C
        "key_dim": 16,  # C: half-size as the paper's
        "value_dim": 32,  # C
        "ff_dim": 128,  # C: half-size
        "dropout": 0.0,  # C: too few steps to overfit
        "recompute": False,  # C: memory is no concern
    },
    "enwik8": _ENWIK8,
    "enwik8-dense": _ENWIK8 | {"patterns": [Causal()]},  # P: Table 2
    "enwik8-strided": _ENWIK8 | {"patterns": [Local(128) | Strided(128)]},  # P: Table 2; C: merged, as fixed is
    "enwik8-windows": _ENWIK8 | {"patterns": [Local(128)] * 3 + [Local(2048)]},  # C: a long window in each fourth block
    "enwik8-small": {
        "length": 1024,  # C, as all below: see cifar10-small
        "position_shape": (32, 32),  # C: l close to the root of the length (P)
        "patterns": [Fixed(32, 8)],  # P: fixed, merged; c = 8
        "num_blocks": 2,  # C
        "num_heads": 4,  # C
        "model_dim": 64,  # C
        "dropout": 0.0,  # C
        "recompute": False,  # C
    },
    "imagenet64": _IMAGENET64,
    "imagenet64-96": _IMAGENET64 | {"num_blocks": 96},  # P: the model of the samples
    "imagenet64-small": {
        "length": 12288,  # P
        "position_shape": (64, 64, 3),  # P
        "patterns": [Local(128), Strided(128)],  # P
        "num_blocks": 2,  # C, as all below: see cifar10-small
        "num_heads": 2,  # C
        "model_dim": 32,  # C
        "ff_dim": 64,  # C
        "dropout": 0.0,  # C
        "recompute": False,  # C
    },
    "audio-65k": {
        "length": 65536,  # P
        "position_shape": (256, 256),  # D: attention embedding, rows of l
        "patterns": [Local(256), Strided(256)],  # P: strided; D: l is the root of the length
        "num_blocks": 48,  # C: as ImageNet's, which has the paper's 152M parameters too
        "num_heads": 8,  # C
        "model_dim": 512,  # C
    }
    | _AUDIO,
    "audio-262k": {
        "length": 262144,  # P
        "position_shape": (512, 512),  # D
        "patterns": [Local(512), Strided(512)],  # P, D
        "num_blocks": 20,  # C: 25M parameters (P), as the next two
        "num_heads": 5,  # C
        "model_dim": 320,  # C
    }
    | _AUDIO,
    "audio-1m": {
        "length": 1048576,  # P
        "position_shape": (1024, 1024),  # D
        "patterns": [Local(1024), Strided(1024)],  # P, D
        "num_blocks": 25,  # C: 3M parameters (P), as the next two
        "num_heads": 3,  # C
        "model_dim": 96,  # C
    }
    | _AUDIO,
    "audio-small": {
        "length": 4096,  # C, as all below: see cifar10-small
        "position_shape": (64, 64),  # D
        "patterns": [Local(64), Strided(64)],  # P, D
        "num_blocks": 2,  # C
        "num_heads": 2,  # C
        "model_dim": 48,  # C
        "dropout": 0.0,  # C
        "recompute": False,  # C
    },
}


def preset(name: str) -> dict[str, Any]:
    """The arguments of `SparseTransformer` under a name, as a fresh dictionary."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}. Received: preset={name!r}")
    return copy.deepcopy(PRESETS[name])


def count_parameters(config: dict[str, Any], vocab_size: int = 256) -> int:
    """How many parameters the model of a configuration has, without making it.

    Biases on query, key, value, output and both feed-forward layers, two normalisations a block and a last one, tables
    of tokens, of each axis of positions and of each condition, untied logits without bias, and the start vector.

    Args:
        config: arguments of `SparseTransformer`, as in `PRESETS`.
        vocab_size: number of tokens.
    """
    d, heads = (positive(name, config[name]) for name in ("model_dim", "num_heads"))
    optional = ("key_dim", "value_dim", "ff_dim")
    given = {name: positive(name, config[name]) for name in optional if config.get(name) is not None}
    keys, values = (heads * given.get(name, d // heads) for name in ("key_dim", "value_dim"))
    hidden = given.get("ff_dim", 4 * d)
    attention = 2 * (d + 1) * keys + (d + 1) * values + (values + 1) * d
    block = attention + (d + 1) * hidden + (hidden + 1) * d + 2 * 2 * d
    embeddings = (vocab_size + sum(config["position_shape"]) + sum(config.get("conditions", ())) + 1) * d
    return config["num_blocks"] * block + embeddings + 2 * d + vocab_size * d


def table():
    """The presets as lines of text: name, length, blocks, heads, model_dim, parameters, patterns."""
    rows = [("preset", "length", "blocks", "heads", "model_dim", "parameters", "patterns")]
    for name, config in PRESETS.items():
        sizes = (f"{config[key]:,}" for key in ("length", "num_blocks", "num_heads", "model_dim"))
        rows.append((name, *sizes, f"{count_parameters(config):,}", ", ".join(map(repr, config["patterns"]))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:-1], row[-1]]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
