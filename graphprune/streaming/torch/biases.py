"""What is added to the product of each weight of a traced graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphprune.ir.torch.program import Program
from graphprune.streaming.core.layout import Convolution, Matrix
from graphprune.streaming.core.sites import Site
from graphprune.streaming.torch.products import bind, operator

_ARGUMENT = {"linear": "bias", "addmm": "self", "conv1d": "bias", "conv2d": "bias",
             "conv3d": "bias", "convolution": "bias"}  # fmt: skip


def torch_biases(program: Program, sites: Iterable[Site]) -> dict[str, str]:
    """The biases of linear layers and convolutions; see `graphprune.streaming.find_biases`."""
    named = {n.name: n for n in program.exported.graph.nodes}
    stored = {
        named[s.arg.name]: program.aliases.get(s.target, s.target)
        for s in program.exported.graph_signature.input_specs
        if s.target is not None and s.arg.name in named
    }
    readers: dict[str, set[str]] = {}
    for node, name in stored.items():
        readers.setdefault(name, set()).update(u.name for u in node.users)
    found: dict[str, str] = {}
    uses: dict[str, set[str]] = {}
    for site in sites:
        uses.setdefault(site.parameter, set()).add(site.node)
        node = _bias(named[site.node], site)
        name = stored.get(node) if node is not None else None
        if name is None or found.setdefault(site.parameter, name) != name:
            found[site.parameter] = ""
    return {
        weight: bias
        for weight, bias in found.items()
        if bias in program.trainable and readers[bias] <= _added(uses[weight], named)
    }


def _bias(node: fx.Node, site: Site) -> fx.Node | None:
    """The node of what is added to a product, by the product's own operator or right after it."""
    if not isinstance(site.layout, Matrix | Convolution):
        return None
    argument = _ARGUMENT.get(operator(node))
    given = bind(node).get(argument) if argument is not None else None
    if isinstance(given, fx.Node):
        return given if _is_vector(given) else None
    if len(node.users) != 1 or not isinstance(site.layout, Matrix):
        return None
    (user,) = node.users
    if operator(user) != "add" or len(user.args) != 2:
        return None
    others = [n for n in user.all_input_nodes if n is not node and _is_vector(n)]
    return others[0] if len(others) == 1 and user.kwargs.get("alpha", 1) == 1 else None


def _is_vector(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() == 1


def _added(uses: set[str], named: dict[str, fx.Node]) -> set[str]:
    """The products themselves, and what reads nothing but them."""
    return uses | {u.name for use in uses for u in named[use].users}
