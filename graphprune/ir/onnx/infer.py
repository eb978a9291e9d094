"""Axis inference over an ONNX graph: the same families of rules as for a torch graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.axes import UNIT, Atom, Dims, atoms
from graphprune.ir.onnx.shapes.quantised import clips
from graphprune.ir.onnx.shapes.sizes import Known, registered_name
from graphprune.ops import Context, Operand, Operator, Typing
from graphprune.ops.families.pointwise import opaque
from graphprune.ops.families.rules import apply_rule, innermost_line, settle_points
from graphprune.ops.onnx import find_op
from graphprune.ops.onnx.standard import ACTIVATIONS, CARRIERS

_MEASURES = ("Shape", "Size")  # these read sizes, not values


def infer_onnx(model: ir.Model, known: Mapping[str, Known]) -> Typing:
    """Give every dimension of every tensor of a graph an axis expression.

    Args:
        model: the model, as `read_onnx` gives it.
        known: what `known_values` found.

    Returns:
        The axes of all values and initialisers. A value has one tuple of axes.
    """
    return _Inference(model, known).run()


def is_folded(known: Known | None) -> bool:
    """Whether a value is a constant of the model that no weight has a part in."""
    if known is None or known.weighted:
        return False
    constant = known.constant
    return constant is not None and (constant.dtype.kind in "iub" or constant.size == 1)


def live_nodes(model: ir.Model, known: Mapping[str, Known]) -> set[ir.Node]:
    """The operators whose values, not only their sizes, reach an output."""
    live: set[ir.Node] = set()
    waiting = list(model.graph.outputs)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or node in live or is_folded(known.get(value.name or "")):
            continue
        live.add(node)
        if node.op_type not in _MEASURES:
            waiting.extend(v for v in node.inputs if v is not None)
        waiting.extend(captured(node))
    return live


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of the outer graph that the bodies of If, Loop and Scan read."""
    found: list[ir.Value] = []
    for attribute in node.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
            found.extend(v for v in inner.inputs if v is not None and v.graph is node.graph)
    return found


class _Inference:
    def __init__(self, model: ir.Model, known: Mapping[str, Known]) -> None:
        self.graph = model.graph
        self.known = known
        self.typing = Typing()
        self.live = live_nodes(model, known)

    def run(self) -> Typing:
        for value in self.graph.inputs:
            found = self.known.get(value.name or "")
            if found is not None:
                ctx = Context(self.typing, value.name or "")
                why = "a dimension of a model input"
                self._set(value, tuple(ctx.fresh(s, why) for s in found.sizes))
        for name, value in self.graph.initializers.items():
            found = self.known.get(name)
            if found is not None:
                dims = _new(found, name)
                self.typing.parameters[name] = dims
                self._set(value, dims)
        for node in self.graph:
            self._node(node)
        self._freeze_outputs()
        return self.typing

    def _set(self, value: ir.Value, dims: Dims) -> None:
        self.typing.values[value.name or ""] = (dims,)

    def _node(self, node: ir.Node) -> None:
        results = [self.known.get(v.name or "") for v in node.outputs]
        if all(is_folded(r) for r in results):
            for value, found in zip(node.outputs, results, strict=True):
                if found is not None:
                    self._set(value, _new(found, value.name or ""))
                    self.typing.constants.add(value.name or "")
            return
        first = next((v.name for v in node.outputs if v.name), "")
        ctx = Context(self.typing, first or "", source_line(node), idle=node not in self.live)
        op = self._operator(node, results)
        shapes = [r for r, v in zip(results, node.outputs, strict=True) if v.name]
        given = self._apply(ctx, node, op, complete=None not in shapes)
        for value, dims, found in zip(node.outputs, given, results, strict=True):
            if value.name and found is not None:
                self._set(value, dims)
        if op.name in ACTIVATIONS and op.operands:
            for e in op.operands[0].dims:
                ctx.hint(e, "activation")
        elif clips(node):
            for e in given[0]:
                ctx.hint(e, "activation")
        if node.op_type not in _MEASURES:
            settle_points(ctx, op, carries=op.name in CARRIERS)
            for i, value in enumerate(node.outputs):
                if i in ctx.given and value.name:
                    self.typing.points[value.name] = (ctx.given[i],)

    def _apply(self, ctx: Context, node: ir.Node, op: Operator, *, complete: bool) -> list[Dims]:
        for value in captured(node):
            for dims in self.typing.values.get(value.name or "", ()):
                for e in dims:
                    ctx.freeze(e, f"the body of {node.op_type} reads it")
        rule = find_op(op.name).axes
        if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return opaque(ctx, op, f"{node.op_type} has a body that depends on data")
        if rule is not None and not complete:
            return opaque(ctx, op, f"the shape of the result of {node.op_type} depends on data")
        return apply_rule(ctx, op, rule)

    def _operator(self, node: ir.Node, results: list[Known | None]) -> Operator:
        arguments: dict[str, Any] = {}
        for i, value in enumerate(node.inputs):
            operand = None if value is None else self._operand(value)
            if operand is not None:
                arguments[str(i)] = operand
        for name, attribute in node.attributes.items():
            if attribute.type != ir.AttributeType.GRAPH:
                arguments[name] = attribute.value
        sizes = tuple(None if r is None else r.sizes for r in results)
        return Operator(registered_name(node), arguments, sizes)

    def _operand(self, value: ir.Value) -> Operand | None:
        name = value.name or ""
        dims = self.typing.values.get(name)
        if dims is None:
            return None
        constant = self.known[name].constant if is_folded(self.known.get(name)) else None
        whole = constant is not None and constant.dtype.kind in "iu"
        places = np.asarray(constant, dtype=np.int64) if whole else None
        return Operand(dims[0], self.typing.points.get(name, (None,))[0], places)

    def _freeze_outputs(self) -> None:
        for value in self.graph.outputs:
            ctx = Context(self.typing, value.name or "")
            for dims in self.typing.values.get(value.name or "", ()):
                for e in dims:
                    ctx.freeze(e, "a dimension of a model output")
            for points in self.typing.points.get(value.name or "", ()):
                if points is not None:
                    points.as_numbers(ctx.reason("its indices are a model output"))
        self._freeze_unrelated()
        read = {v.name for n in self.live for v in n.inputs if v is not None}
        tied = {a for name in read for a in self._atoms(name or "")}
        for name in self.graph.initializers:
            for atom in self._atoms(name):
                if name not in read and atom not in tied:
                    Context(self.typing, name).freeze(atom, "no operator reads it")

    def _freeze_unrelated(self) -> None:
        """Freeze what only one initialiser has: no operator has said what it goes with."""
        owners: dict[Atom, set[str]] = {}
        for name in self.typing.values:
            for atom in self._atoms(name):
                owners.setdefault(atom, set()).add(name)
        for atom, names in owners.items():
            (name,) = names if len(names) == 1 else ("",)
            if name in self.graph.initializers and not atom.frozen:
                Context(self.typing, name).freeze(atom, "no operator relates it to anything")

    def _atoms(self, name: str) -> set[Atom]:
        return {a for dims in self.typing.values.get(name, ()) for e in dims for a in atoms(e)}


def source_line(node: ir.Node) -> str:
    """The line of the model's own code that a torch exporter wrote down, or the node's name."""
    line = innermost_line(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""))
    return line or node.name or ""


def _new(known: Known, name: str) -> Dims:
    return tuple(Atom(n, name) if n != 1 else UNIT for n in known.shapes[0])
