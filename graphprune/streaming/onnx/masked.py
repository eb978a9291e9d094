"""An ONNX model as a plan leaves it, at full size, for a streamed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from graphprune.axes import Ragged
from graphprune.axes.keep import Keep
from graphprune.errors import PlanError
from graphprune.frontends.onnx.load import analyse
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.oracle.masked_onnx import mask_onnx
from graphprune.plan.plan import Selection
from graphprune.streaming.core.sites import Group
from graphprune.streaming.onnx.sums import Slot


def masked_model(
    program: OnnxProgram, selection: Selection, sizes: Mapping[str, Sequence[int]]
) -> ir.Model:
    """The masked model for inputs of some sizes.

    Args:
        program: the dense program.
        selection: what stays.
        sizes: input name to shape.

    Raises:
        PlanError: for these sizes the model has other structures.
        LoadError: the sizes don't fit the model.
        VerifyError: an operator over a pruned axis has no formula.
    """
    current = program
    if any(program.known[name].shapes[0] != tuple(shape) for name, shape in sizes.items()):
        current = analyse(program.model.clone(), sizes, None)
    if current.fingerprint != program.fingerprint:
        raise PlanError(
            "the plan means something else for samples of these sizes",
            where=", ".join(f"{name} {tuple(shape)}" for name, shape in sizes.items()),
            hint="give the example shapes when the model is loaded",
        )
    model = current.model.clone()
    cuts = [block for blocks in selection.cuts.values() for block in blocks]
    mask_onnx(model, current.known, current.typing, _moved(program, current, selection), cuts)
    return model


def _moved(program: OnnxProgram, current: OnnxProgram, selection: Selection) -> Keep:
    """Masks by the axes of another analysis of the same model."""
    keep = {}
    for structure in program.structures:
        found = None if structure.atom is None else selection.keep.get(structure.atom)
        own = current.by_name[structure.name]
        if found is None or own.atom is None:
            continue
        if isinstance(found, Ragged):
            assert own.within is not None  # as in the other analysis
            found = Ragged(own.within, found.mask)
        keep[own.atom] = found
    return keep


def masked_groups(
    program: OnnxProgram, model: ir.Model, groups: Sequence[Group]
) -> tuple[Group, ...]:
    """Groups whose sites read what the masked model has in place of the dense model's values.

    Args:
        program: the dense program.
        model: the masked model; products have the names that they have in the dense one.
        groups: of the dense program.
    """
    dense, masked = _producers(program.model.graph), _producers(model.graph)

    def moved(group: Group) -> Group:
        reads: dict[str, str] = {}
        for site in group.sites:
            names = [None if v is None else v.name for v in dense[site.node].inputs]
            value = masked[site.node].inputs[names.index(site.operand)]
            reads.setdefault(site.reads, "" if value is None else value.name or "")
        return replace(group, sites=tuple(replace(s, reads=reads[s.reads]) for s in group.sites))

    return tuple(map(moved, groups))


def others(model: ir.Model, slots: Mapping[str, Slot]) -> dict[str, str]:
    """Name of a product to that of the value that it is added to in a model, dense or masked."""
    nodes = _producers(model.graph)
    found = {}
    for product, (user, place) in slots.items():
        value = nodes[user].inputs[place] if user in nodes else None
        if value is not None:
            found[product] = value.name or ""
    return found


def _producers(graph: ir.Graph) -> dict[str, ir.Node]:
    return {v.name or "": node for node in graph for v in node.outputs}
