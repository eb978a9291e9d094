"""Units that a model picks by index, such as experts: the parameters of which each has a slice.

What goes with a router reads the axis by operators that notice units (softmax, top-k), and the
weights of the units are picked along it. A gate is laid on the last of them: it scales what the
unit adds, and a closed unit is never picked.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphprune.analysis.structure import Structure
from graphprune.streaming.torch.products import operator
from graphprune.training.gates.flow import Graph

_PICKING = frozenset("index index_select".split())
_MOVED = frozenset(
    "to _to_copy alias clone contiguous view reshape transpose permute unsqueeze squeeze t "
    "mT".split()
)
"""Operators that hand values on as they are."""


def picked_last(graph: Graph, structure: Structure) -> list[tuple[str, int]]:
    """The parameters that are picked and used last, each with its dimension along the structure.

    A bias that is added to a product is picked with the product's weight.

    Returns:
        Nothing where the model picks none along the structure.
    """
    aliases = graph.program.aliases
    dims = {aliases.get(p, p): d for p, d in structure.members}
    used: dict[fx.Node, dict[str, int]] = {}
    for node, name in graph.parameters.items():
        if name not in dims:
            continue
        for user in _users(graph, node):
            if operator(user) in _PICKING and user not in graph.stored:
                for at in _users(graph, user):
                    used.setdefault(at, {})[name] = dims[name]
    if not used:
        return []
    order = {node: place for place, node in enumerate(graph.program.exported.graph.nodes)}
    last = max(used, key=order.__getitem__)
    found = dict(used[last])
    if operator(last) in ("add", "add_"):
        for operand in last.all_input_nodes:
            found |= used.get(_source(operand), {})
    return list(found.items())


def _users(graph: Graph, node: fx.Node) -> Iterator[fx.Node]:
    """The operators that use a value, through all that hands it on."""
    for user in node.users:
        if user not in graph.live:
            continue
        if operator(user) in _MOVED:
            yield from _users(graph, user)
        else:
            yield user


def _source(node: fx.Node) -> fx.Node:
    """The operator whose value a node hands on."""
    while operator(node) in _MOVED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
