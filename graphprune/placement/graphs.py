"""Graphs that run on another device than that on which they were traced."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from graphprune.placement.devices import CPU


def default_device(
    target: torch._ops.OpOverload[..., Any], node: fx.Node
) -> dict[str, torch.device]:
    """The device of what an operator makes of no tensor, which would be torch's default."""
    makes = any(a.name == "device" for a in target._schema.arguments)
    operands = (i.meta.get("val") for i in node.all_input_nodes)
    return {"device": CPU} if makes and not any(isinstance(v, Tensor) for v in operands) else {}


def to_processor(value: Any) -> Any:
    """An argument of an operator, on the processor."""
    if isinstance(value, torch.device):
        return CPU
    return value.to(CPU) if isinstance(value, Tensor) else value


def moved_graphs(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Copy a graph with all graphs inside it, to run on a device.

    Args:
        module: it isn't changed; parameters and buffers stay where they are in the copy, too.
        device: of what its operators make, and of its constants.
    """
    kept = [*module.parameters(), *module.buffers()]
    result = copy.deepcopy(module, {id(t): t for t in kept})

    def put(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for part in result.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, name, value.to(device))
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.nodes:
            target = node.target
            node.args = cast("tuple[Any, ...]", map_aggregate(node.args, put))
            node.kwargs = cast("dict[str, Any]", map_aggregate(node.kwargs, put))
            if isinstance(target, torch._ops.OpOverload):
                made = default_device(target, node)
                node.kwargs = {**map_aggregate(made, put), **node.kwargs}
        part.recompile()
    return result
