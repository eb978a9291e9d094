"""What is left alone unless it is asked for by name: routers, outputs, depthwise kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphprune.ir.torch.program import Program
from graphprune.streaming.core.layout import Convolution
from graphprune.streaming.core.scope import routers
from graphprune.streaming.core.sites import Site


def unwanted(program: Program, found: Mapping[str, Sequence[Site]]) -> dict[str, str]:
    """Parameters that are not treated by default, to the reason."""
    nodes = {n.name: n for n in program.exported.graph.nodes}
    known_routers = routers(program)
    reasons: dict[str, str] = {}
    for name, sites in found.items():
        layout = sites[0].layout
        shape = program.parameters[name]
        out = shape[1] if getattr(layout, "transposed", False) and len(shape) == 2 else shape[0]
        if name in known_routers:
            reasons[name] = "a router"
        elif any(_is_output(nodes[s.node]) for s in sites):
            reasons[name] = "its result is an output of the model"
        elif isinstance(layout, Convolution) and shape[1] == 1 and layout.groups > 1:
            reasons[name] = "a depthwise convolution"
        elif len(shape) == 2 and out == 1:
            reasons[name] = "it has a single output"
    return reasons


def _is_output(node: fx.Node) -> bool:
    """Whether a result reaches the model's outputs without meeting another tensor."""
    waiting, seen = [node], {node}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user.op == "output":
                return True
            tensors = [n for n in user.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | list | tuple)]  # fmt: skip  # noqa: E501
            if len(tensors) == 1 and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
