"""The inputs of an exported graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphprune.analysis.signature import Input
from graphprune.ir.torch.interpreter import input_names

# Operators that hand token ids on as they are, on their way to a table.
_SAME = ("view", "reshape", "_to_copy", "to", "clone", "contiguous", "alias", "unsqueeze", "slice")


def inputs_of_graph(exported: ExportedProgram) -> list[Input]:
    """The inputs of a graph, in order; only what is no tensor is missing."""
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    found = []
    for name in input_names(exported):
        value = nodes[name].meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes: tuple[Any, ...] = tuple(value.shape)
            shape = tuple(s if isinstance(s, int) else None for s in sizes)
            bound = _bound(nodes[name])
            found.append(Input(name, shape, value.dtype, bound, _longest(exported, value)))
    return found


def _bound(node: fx.Node) -> int | None:
    """Rows of the tables that an input's integers are looked up in."""
    bounds = []
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        for user in current.users:
            name = getattr(user.target, "_opname", "")
            if name == "embedding" and user.args[1] is current:
                table = user.args[0]
                value = table.meta.get("val") if isinstance(table, fx.Node) else None
                if isinstance(value, torch.Tensor):
                    bounds.append(int(value.shape[0]))
            elif name in _SAME and user not in seen:
                seen.add(user)
                waiting.append(user)
    return min(bounds, default=None)


def _longest(exported: ExportedProgram, value: torch.Tensor) -> int | None:
    size: Any = value.shape[1] if value.dim() > 1 else 0
    if isinstance(size, int):
        return None
    symbol = size.node.expr
    known = exported.range_constraints.get(symbol)
    upper = getattr(known, "upper", None)
    return int(str(upper)) if getattr(upper, "is_Integer", False) else None  # else infinity
