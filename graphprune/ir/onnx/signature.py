"""The inputs of an ONNX graph, and what their integers point into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphprune.analysis.signature import Input
from graphprune.ir.onnx.shapes.sizes import Known, qualified

# Operators that hand indices on as they are, on their way to a table.
_SAME_VALUES = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"}

# Operators that look the indices in one of their inputs up in another: its position.
_TABLES = {
    ("Gather", 1): 0,
    ("RotaryEmbedding", 3): 1,
    ("com.microsoft.RotaryEmbedding", 1): 2,
    ("com.microsoft.GroupQueryAttention", 9): 7,
    ("com.microsoft.EmbedLayerNormalization", 0): 2,
    ("com.microsoft.EmbedLayerNormalization", 1): 4,
    ("com.microsoft.EmbedLayerNormalization", 8): 3,
}


def inputs_of_model(model: ir.Model, values: Mapping[str, Known]) -> Iterator[Input]:
    """The inputs of a graph, in order; only what is no tensor is missing.

    Args:
        model: the model.
        values: what is known about its values.
    """
    for value in model.graph.inputs:
        name = value.name or ""
        known = values.get(name)
        if known is None:
            continue
        shape = tuple(None if s.dynamic else s.size for s in known.sizes)
        bound = None if known.dtype.is_floating_point() else index_bound(values, value)
        yield Input(name, shape, _dtype(known.dtype.numpy()), bound)


def _dtype(dtype: Any) -> torch.dtype | None:
    if str(dtype) == "bfloat16":
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        return None


def index_bound(values: Mapping[str, Known], value: ir.Value) -> int | None:
    """What the elements of an integer input have to stay below; None for what isn't looked up."""
    bounds = []
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        for use in current.uses():
            node = use.node
            looked_up = _TABLES.get((qualified(node), use.idx))
            if looked_up is not None and looked_up < len(node.inputs):
                table = node.inputs[looked_up]
                axis = node.attributes.get_int("axis", 0)
                known = None if table is None else values.get(table.name or "")
                if known is not None:
                    bounds.append(known.shapes[0][axis])
            elif (classes := _classes(values, node, use.idx)) is not None:
                bounds.append(classes)
            elif node.op_type in _SAME_VALUES and node not in seen:
                seen.add(node)
                waiting.extend(node.outputs)
    return max(1, min(bounds)) if bounds else None


def _classes(values: Mapping[str, Known], node: ir.Node, position: int) -> int | None:
    """How many numbers an operator tells apart: OneHot, or Equal with a list of them."""
    if (node.op_type, position) not in (("OneHot", 0), ("Equal", 0), ("Equal", 1)):
        return None
    other = node.inputs[1 - position]
    known = None if other is None else values.get(other.name or "")
    constant = None if known is None else known.constant
    if constant is None or constant.dtype.kind not in "iu" or not constant.size:
        return None
    if node.op_type == "OneHot":
        return int(constant.reshape(-1)[0])
    return int(constant.max()) + 1 if constant.size > 1 else None
