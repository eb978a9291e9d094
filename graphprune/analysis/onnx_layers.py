"""Residual sums of an ONNX graph: what its hidden width runs along."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.ops import Typing

_ADD = ("Add", "Sum")


def residual_sums(graph: ir.Graph, typing: Typing) -> list[str]:
    """Names of the values ``x + f(x)`` whose f multiplies by weights all the way."""
    weighted = {name for name, _ in typing.contractions}
    places = {node: i for i, node in enumerate(graph)}
    found = []
    for node in graph:
        sources = [v.producer() for v in node.inputs if v is not None]
        if node.op_type not in _ADD or len(sources) != 2 or None in sources:
            continue
        early, late = sorted((s for s in sources if s is not None), key=places.__getitem__)
        depends = _computed_from(early, late, places, frozenset())
        if depends and not _computed_from(early, late, places, weighted):
            found.append(node.outputs[0].name or "")
    return found


def _computed_from(
    early: ir.Node, late: ir.Node, places: dict[ir.Node, int], barriers: set[str] | frozenset[str]
) -> bool:
    """Whether `late` depends on `early` other than through `barriers`."""

    def stops(node: ir.Node) -> bool:
        return (node.outputs[0].name or "") in barriers

    if stops(late):
        return False
    waiting, seen = [late], {late}
    while waiting:
        for value in waiting.pop().inputs:
            node = None if value is None else value.producer()
            if node is early:
                return True
            if node is None or node in seen or places[node] <= places[early] or stops(node):
                continue
            seen.add(node)
            waiting.append(node)
    return False
