"""Sites of an ONNX graph: the operators that multiply an activation by an initialiser."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_ir as ir

from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.scopes import module_path
from graphprune.streaming.core.scope import unwanted
from graphprune.streaming.core.sites import Site, Sites, selected
from graphprune.streaming.onnx.products import View, followed, origin, product_site
from graphprune.streaming.onnx.scope import is_chosen_from, is_output


def find_onnx_sites(
    program: OnnxProgram,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    every: bool = False,
) -> Sites:
    """Find the sites of an ONNX program, as `graphprune.streaming.find_sites` does."""
    found: dict[str, list[Site]] = {}
    skipped: dict[str, str] = {}
    places = {v.name or "": i for i, n in enumerate(program.model.graph) for v in n.outputs}
    for name, value in program.model.graph.initializers.items():
        if name not in program.trainable or program.ranks.get(name, 0) < 2:
            continue
        sites = _sites_of(program, name, value, places)
        if not isinstance(sites, str):
            found[name] = sites
        elif prod(program.parameters[name]) > max(program.parameters[name]):
            skipped[name] = sites  # other than scales and biases with dimensions of size 1
    products = {n.outputs[0].name: n.outputs[0] for n in program.model.graph}
    reasons = (
        {}
        if every
        else unwanted(
            program,
            found,
            lambda s: is_output(program, products[s.node]),
            lambda s: is_chosen_from(program, products[s.node]),
        )
    )
    return selected(program, found, skipped, reasons, places, include, exclude)


def _sites_of(
    program: OnnxProgram, name: str, value: ir.Value, places: dict[str, int]
) -> list[Site] | str:
    """The sites of an initialiser, or why it can't be treated."""
    dtype = program.known[name].dtype
    if name in program.encodings:
        return "it is quantised"
    if not dtype.is_floating_point() or dtype.bitwidth < 16:
        return f"its dtype is {dtype}"
    if value.is_graph_output():
        return "it is an output of the model"
    sites: list[Site] = []
    for node, view in followed(program.model.graph, program.known, View(value)):
        if isinstance(view, str):
            return view
        result = product_site(node, view, program.known)
        if isinstance(result, str):
            return result
        layout, operand = result
        sites.append(
            Site(
                parameter=name,
                node=node.outputs[0].name or "",
                reads=origin(operand, layout, program.known).name or "",
                operand=operand.name or "",
                layout=layout,
                path=module_path(node) or node.name or "",
            )
        )
    if not sites:
        return "nothing reads it"
    sites.sort(key=lambda site: places[site.node])
    if len({s.layout for s in sites}) > 1:
        return "its uses take it for different matrices"
    return sites
