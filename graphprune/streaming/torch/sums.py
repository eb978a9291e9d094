"""What products are added to in a traced graph: for the gap of a residual stream."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphprune.ir.torch.program import Program
from graphprune.streaming.core.layout import Matrix
from graphprune.streaming.core.sites import Site
from graphprune.streaming.torch.products import operator

_UNCHANGED = {"view", "reshape", "unsafe_view", "_unsafe_view", "unsqueeze", "squeeze", "clone",
              "contiguous", "alias", "_to_copy", "to", "dropout"}  # fmt: skip
"""Operators that leave the rows of a product as they are, up to the shape around them."""


def summands(program: Program, sites: Iterable[Site]) -> dict[str, str]:
    """What each product is added to, if that is computed before it.

    Args:
        program: the program.
        sites: the products.

    Returns:
        Name of a product to that of the other value, which has its shape.
    """
    nodes = {n.name: n for n in program.exported.graph.nodes}
    places = {n: i for i, n in enumerate(nodes.values())}
    specs = program.exported.graph_signature.input_specs
    weights = {nodes[s.arg.name] for s in specs if s.target is not None and s.arg.name in nodes}
    found: dict[str, str] = {}
    for site in sites:
        node = nodes[site.node]
        other = _met(node, weights) if _is_plain(site) else None
        if other is not None and places[other] < places[node]:
            found[site.node] = other.name
    return found


def _is_plain(site: Site) -> bool:
    return isinstance(site.layout, Matrix) and site.layout.features == -1


def _met(node: fx.Node, weights: set[fx.Node]) -> fx.Node | None:
    """What a product is added to, whatever biases are added before."""
    while len(node.users) == 1:
        (user,) = node.users
        kind = operator(user)
        if kind == "add" and len(user.all_input_nodes) == 2 and len(user.args) == 2:
            (other,) = (n for n in user.all_input_nodes if n is not node)
            if other not in weights:
                same = _shape(other) == _shape(node)
                alone = user.kwargs.get("alpha", 1) == 1
                return other if same and alone and other.op == "call_function" else None
        elif kind not in _UNCHANGED:
            return None
        node = user
    return None


def _shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
