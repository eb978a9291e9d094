"""Sites of a traced graph: the operators that multiply an activation by a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from graphprune.ir.torch.flow import module_path
from graphprune.ir.torch.liveness import live_nodes
from graphprune.ir.torch.program import Program
from graphprune.streaming.core.layout import Layout
from graphprune.streaming.core.scope import unwanted
from graphprune.streaming.core.sites import Site, Sites, selected
from graphprune.streaming.torch.products import followed, origin, product_site


def find_sites(
    program: Program,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    every: bool = False,
) -> Sites:
    """Find the sites of a traced program, as `graphprune.streaming.find_sites` does."""
    found: dict[str, list[Site]] = {}
    skipped: dict[str, str] = {}
    live = live_nodes(program.exported.graph)
    places = {n: i for i, n in enumerate(program.exported.graph.nodes)}
    for name, nodes in _matrices(program).items():
        sites = _sites_of(name, nodes, live, places)
        if isinstance(sites, str):
            skipped[name] = sites
        else:
            found[name] = sites
    named = {n.name: n for n in places}
    reasons = {} if every else unwanted(program, found, lambda s: _is_output(named[s.node]))
    order = {n.name: i for n, i in places.items()}
    return selected(program, found, skipped, reasons, order, include, exclude)


def _matrices(program: Program) -> dict[str, list[fx.Node]]:
    """Canonical names of floating parameters with two dimensions or more, to their values."""
    placeholders = {n.name: n for n in program.exported.graph.nodes if n.op == "placeholder"}
    found: dict[str, list[fx.Node]] = {}
    for spec in program.exported.graph_signature.input_specs:
        if spec.target is None:
            continue
        name = program.aliases.get(spec.target, spec.target)
        node = placeholders.get(spec.arg.name)
        value = node.meta.get("val") if node is not None else None
        if name in program.trainable and isinstance(value, torch.Tensor) and value.dim() > 1:
            assert node is not None
            found.setdefault(name, []).append(node)
    return found


def _sites_of(
    name: str, nodes: Iterable[fx.Node], live: set[fx.Node], places: dict[fx.Node, int]
) -> list[Site] | str:
    """The sites of a parameter, or why it can't be treated."""
    sites: list[tuple[int, Site]] = []
    for node in nodes:
        if not node.meta["val"].is_floating_point():
            return f"its dtype is {node.meta['val'].dtype}"
        for user, view in followed(node, live):
            if isinstance(view, str):
                return view
            result = product_site(user, view)
            if isinstance(result, str):
                return result
            layout, operand = result
            sites.append((places[user], _site(name, user, operand, layout, view.chosen)))
    if not sites:
        return "nothing reads it"
    ordered = [site for _, site in sorted(sites, key=lambda pair: pair[0])]
    if len({s.layout for s in ordered}) > 1:
        return "its uses take it for different matrices"
    return ordered


def _site(
    name: str, user: fx.Node, operand: fx.Node, layout: Layout, chosen: fx.Node | None
) -> Site:
    return Site(
        parameter=name,
        node=user.name,
        reads=origin(operand, layout).name,
        operand=operand.name,
        layout=layout,
        chosen=None if chosen is None else chosen.name,
        path=module_path(user),
    )


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
