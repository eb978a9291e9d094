"""What products are added to: for the gap that a residual stream has to the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import onnx_ir as ir

from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.shapes.sizes import Known, qualified
from graphprune.streaming.core.layout import Matrix
from graphprune.streaming.core.sites import Site
from graphprune.streaming.onnx.products import GEMMS, trains

Slot: TypeAlias = "tuple[str, int]"
"""An input of an operator: the name of its first result, and the position."""

_UNCHANGED = frozenset("Identity Cast Reshape Flatten Squeeze Unsqueeze Dropout".split())
"""Operators that leave the rows of a product as they are, up to the shape around them."""
_SKIPPED = frozenset(f"com.microsoft.Skip{name}LayerNormalization" for name in ("", "Simplified"))


def summands(program: OnnxProgram, sites: Iterable[Site]) -> dict[str, Slot]:
    """Where each product meets the value that it is added to, if that is computed before it.

    Args:
        program: the program.
        sites: the products.

    Returns:
        Name of a product to the operator's input with the other value, which has its shape.
    """
    nodes = {v.name or "": node for node in program.model.graph for v in node.outputs}
    order = {node: i for i, node in enumerate(program.model.graph)}
    found: dict[str, Slot] = {}
    for site in sites:
        node = nodes[site.node]
        slot = (
            _met(node) if isinstance(site.layout, Matrix) and site.layout.features == -1 else None
        )
        if slot is None:
            continue
        user, place, value = slot
        other = user.inputs[place]
        producer = None if other is None else other.producer()
        early = producer is not None and order[producer] < order[node]
        if early and other is not None and _same_shape(program.known, value, other):
            found[site.node] = (user.outputs[0].name or "", place)
    return found


def _met(node: ir.Node) -> tuple[ir.Node, int, ir.Value] | None:
    """The operator that adds, the position of the other value, and what becomes of the product."""
    if node.attributes.get_float("alpha", 1.0) != 1 or "activation" in node.attributes:
        return None
    value = node.outputs[0]
    third = node.inputs[2] if qualified(node) in GEMMS and len(node.inputs) > 2 else None
    if third is not None and not third.is_initializer():
        return (node, 2, value) if node.attributes.get_float("beta", 1.0) == 1 else None
    while len(uses := list(value.uses())) == 1 and not value.is_graph_output():
        user, place = uses[0]
        name = qualified(user)
        if (name in _SKIPPED and place < 2) or name == "Add":
            other = user.inputs[1 - place]
            if other is None or other is value:
                return None
            if not other.is_initializer():
                return user, 1 - place, value
            if name in _SKIPPED:
                return None
        elif name not in _UNCHANGED or place or (name == "Dropout" and trains(user)):
            return None
        value = user.outputs[0]
    return None


def _same_shape(known: Mapping[str, Known], a: ir.Value, b: ir.Value) -> bool:
    first, second = (known.get(v.name or "") for v in (a, b))
    return first is not None and second is not None and first.shapes == second.shapes
