"""Values that follow from constants alone, where shapes or the course of a graph depend on them.

``(n[:, 0] * n[:, 1]).sum().item()`` has a value if `n` is stored in the model, and no tensor
without data can tell it. The operators that ask for values are few, and so are their operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

_ASKING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ASKING_TOO = frozenset(
    f"aten::{name}"
    for name in "tensor_split repeat_interleave is_nonzero nonzero_numpy Int Bool Float".split()
)
"""Those that torch doesn't tag, in the uses in which a tensor tells sizes."""


def asks_for_values(node: fx.Node) -> bool:
    """Whether a call can't be made with tensors that have no data."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    if name == "aten::index":
        tensors = [n.meta.get("val") for n in node.all_input_nodes]
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tensors[1:])
    if name in ("aten::tensor_split", "aten::repeat_interleave"):
        several = len(node.all_input_nodes) > 1
        return several or node.target is torch.ops.aten.repeat_interleave.Tensor
    return name in _ASKING_TOO or _is_tagged(node.target)


@cache
def _is_tagged(target: torch._ops.OpOverload) -> bool:
    return any(tag in target.tags for tag in _ASKING)


def known_values(
    graph: fx.Graph, stored: Mapping[str, str], tensor: Callable[[str], Any]
) -> dict[str, Any]:
    """The values of operators that ask for values, and of their operands.

    Args:
        graph: parameters are placeholders.
        stored: the placeholders of what the model stores, to its name.
        tensor: gives a stored tensor by name; it is asked for those that matter only.

    Returns:
        By name; without those that depend on more than constants, or on tensors without data.
    """
    waiting = [n for n in graph.nodes if asks_for_values(n)]
    if not waiting:
        return {}
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in stored if node.op == "placeholder" else _computes(node, constant):
            constant.add(node)
    waiting += [operand for n in waiting for operand in n.all_input_nodes]
    wanted: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in constant and node not in wanted:
            wanted.add(node)
            waiting.extend(node.all_input_nodes)
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node not in wanted or not all(n.name in found for n in node.all_input_nodes):
            continue
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: found[n.name])
            with torch.no_grad():
                found[node.name] = node.target(*args, **kwargs)
        elif _has_data(value := tensor(stored[node.name])):
            found[node.name] = value
    return found


def _computes(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a call gives the same on all inputs."""
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    called = node.op == "call_function" and not isinstance(
        node.target, torch._ops.HigherOrderOperator
    )
    return called and not drawn and constant.issuperset(node.all_input_nodes)


def _has_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta
