"""What of a program fits into memory in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from graphprune.checkpoints import memory
from graphprune.checkpoints.memory import available_memory
from graphprune.ir.torch.program import Program

_WIDE = 8
"""Bytes of a number in float64."""

_COPIES = 4
"""Of a weight at a time, at most: as read, widened, with zeros, and laid out for a product."""


def affordable_dtype(program: Program) -> torch.dtype:
    """What a graph can be run in: float64, or float32 where memory is short even for one weight.

    Graphs read a weight where it is used, widen it and let it go again, layer by layer. So it is
    the largest one that counts, which has to fit into half of the free memory four times.
    """
    largest = max(_counts(program), default=0)
    fits = _COPIES * _WIDE * largest <= available_memory() // 2
    return torch.float64 if fits else torch.float32


def is_widened_whole(program: Program) -> bool:
    """Whether a copy of the whole model in float64 may be held; else modules widen as they go."""
    return _WIDE * sum(_counts(program)) <= min(memory.HELD, available_memory() // 2)


def _counts(program: Program) -> list[int]:
    """How many numbers each stored tensor has, tied ones once."""
    stored = {
        spec.target: node.meta["val"]
        for spec, node in zip(
            program.exported.graph_signature.input_specs,
            program.exported.graph.find_nodes(op="placeholder"),
            strict=True,
        )
        if spec.kind != InputKind.USER_INPUT and spec.target not in program.aliases
    }
    return [v.numel() for v in stored.values() if isinstance(v, Tensor)]
