"""Whether a program fits into memory in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from graphprune.checkpoints.memory import available_memory
from graphprune.ir.torch.program import Program


def affordable_dtype(program: Program) -> torch.dtype:
    """float64 where four times the weights fit into half of the free memory, else float32."""
    stored = {
        spec.target: node.meta["val"]
        for spec, node in zip(
            program.exported.graph_signature.input_specs,
            program.exported.graph.find_nodes(op="placeholder"),
            strict=True,
        )
        if spec.kind != InputKind.USER_INPUT and spec.target not in program.aliases
    }
    size = sum(v.numel() * v.element_size() for v in stored.values() if isinstance(v, Tensor))
    return torch.float64 if 4 * size <= available_memory() // 2 else torch.float32
