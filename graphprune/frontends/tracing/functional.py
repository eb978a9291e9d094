"""In-place operators made functional.

``x.relu_()`` is ``x.relu()`` wherever `x` is read afterwards, under whatever name; see
`graphprune.frontends.tracing.in_place`. Writes of a kind that isn't known there (to lists of
tensors, by operators of others) are left to torch's own functionalisation, which takes the whole
graph apart: it also decomposes the operators that may alias their inputs (batch norm, reshape,
chunk), which have rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphprune.frontends.tracing.aliases import Aliases, hides_alias
from graphprune.frontends.tracing.in_place import Unsupported, written_out

aten = torch.ops.aten

# Functional operators that aren't called like the in-place one without its underscore.
_COUNTERPARTS = {
    aten.normal_.default: aten.normal_functional.default,
    aten.requires_grad_.default: aten.alias.default,
    aten.fill_diagonal_.default: aten.fill.Scalar,  # of the diagonal
}


def functional(exported: ExportedProgram) -> ExportedProgram:
    """`exported` without in-place operators.

    Args:
        exported: may be changed.

    Returns:
        A program that computes the same values.
    """
    mutating = [n for n in exported.graph.nodes if _is_mutable(n.target)]
    if not mutating:
        return exported
    aliases = Aliases(exported.graph.nodes)
    writes = {node: _counterpart(node.target) for node in mutating}
    if all(target is not None and _has_first(node) for node, target in writes.items()):
        try:
            return written_out(exported, writes, aliases)
        except Unsupported:
            pass
    return _by_torch(exported, mutating, aliases)


def _by_torch(
    exported: ExportedProgram, mutating: Iterable[fx.Node], aliases: Aliases
) -> ExportedProgram:
    """The functionalisation of torch, with operators taken apart that would hide a view from it."""
    hiding: set[Any] = {
        member.target
        for node in mutating
        for value in node.all_input_nodes[:1]
        for member in aliases.of(value)
        if hides_alias(member.target)
    }
    known = torch.export.default_decompositions() if hiding else {}
    functional: ExportedProgram = exported.run_decompositions({op: known[op] for op in hiding})
    return functional


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _has_first(node: fx.Node) -> bool:
    """Whether the first operand is a tensor, which is what a counterpart takes the values of."""
    return bool(node.args) and isinstance(node.args[0], fx.Node)


def _counterpart(target: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``; None where there is no operator like that."""
    if target in _COUNTERPARTS:
        return _COUNTERPARTS[target]
    schema = target._schema
    space, _, name = schema.name.partition("::")
    if not name.endswith("_") or not schema.arguments or not schema.arguments[0].alias_info:
        return None
    if any(a.alias_info is not None for a in schema.arguments[1:]):
        return None
    plain = f"__{name[3:]}" if name.startswith("__i") else name[:-1]  # __iand__, relu_
    packet = getattr(getattr(torch.ops, space), plain, None)
    found = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return next((op for op in found if _takes_the_same(op._schema, schema)), None)


def _takes_the_same(functional: Any, schema: Any) -> bool:
    """Whether an operator takes what an in-place one takes, and returns a tensor of its own."""
    takes = [
        [(a.name if i else "", str(a.type)) for i, a in enumerate(s.arguments)]
        for s in (functional, schema)
    ]
    single = [str(r.type) for r in functional.returns] == ["Tensor"]
    return takes[0] == takes[1] and single and not functional.is_mutable
