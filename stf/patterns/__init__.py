"""What attends to what: patterns of sparse causal attention. NumPy only.

The sets are those of Child, Gray, Radford and Sutskever, "Generating Long Sequences with Sparse
Transformers" (arXiv 1904.10509, Section 4), for positions 0 ... n-1; every one is causal, `j <= i`.
"""

from stf.patterns.blocks import Blocks
from stf.patterns.causal import Causal
from stf.patterns.component import Component, Kind
from stf.patterns.fixed import Fixed
from stf.patterns.local import Local
from stf.patterns.lowering import Program, components_mask, lower
from stf.patterns.own_block import OwnBlock
from stf.patterns.pattern import Pattern
from stf.patterns.per_head import PerHead
from stf.patterns.reach import hops
from stf.patterns.serialization import deserialize, get, register, serialize
from stf.patterns.sink import Sink
from stf.patterns.strided import Strided
from stf.patterns.summary import Summary
from stf.patterns.union import Union
from stf.patterns.window import Window

__all__ = [
    "Blocks",
    "Causal",
    "Component",
    "Fixed",
    "Kind",
    "Local",
    "OwnBlock",
    "Pattern",
    "PerHead",
    "Program",
    "Sink",
    "Strided",
    "Summary",
    "Union",
    "Window",
    "components_mask",
    "deserialize",
    "get",
    "hops",
    "lower",
    "register",
    "serialize",
]
