"""Axis inference over an exported torch graph: one pass, one rule per operator."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from graphprune.axes import UNIT, Atom, Dims, Select, atoms
from graphprune.axes.expr import IntArray
from graphprune.ir.torch.liveness import live_nodes
from graphprune.ir.torch.sizes import ExampleSizes
from graphprune.ops import Context, Operand, Operator, Sizes, Typing
from graphprune.ops.families.pointwise import ACTIVATIONS, elementwise_each
from graphprune.ops.families.rules import apply_rule, innermost_line, settle_points
from graphprune.ops.index_types import Points
from graphprune.ops.torch import find_op
from graphprune.ops.torch.aten import CARRIERS

_ABOUT_SHAPES = ("aten._assert", "aten.sym_")  # these don't read the values of tensors
_SAME_VALUES = frozenset(
    f"aten.{name}"
    for name in "to _to_copy lift_fresh_copy lift_fresh detach clone alias contiguous".split()
)
_INDICES = (torch.int64, torch.int32)
_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def infer(exported: ExportedProgram, aliases: Mapping[str, str]) -> Typing:
    """Give every dimension of every tensor of `exported` an axis expression.

    Args:
        exported: a program without in-place operators.
        aliases: tied parameter name to the name whose axes it shares.

    Returns:
        The axes of all values, parameters and buffers, with what was learnt on the way.
    """
    return _Inference(exported, aliases).run()


def source_line(node: fx.Node) -> str:
    """The innermost line of the model's own code that made `node`, "file.py:12", or ""."""
    return innermost_line(node.meta.get("stack_trace") or "")


class _Inference:
    def __init__(self, exported: ExportedProgram, aliases: Mapping[str, str]) -> None:
        self.exported = exported
        self.aliases = aliases
        self.sizes = ExampleSizes(exported)
        self.typing = Typing()
        self.places: dict[str, IntArray] = {}  # constant lists of integers, by value name
        self.live = live_nodes(exported.graph)
        self.specs = {s.arg.name: s for s in exported.graph_signature.input_specs}

    def run(self) -> Typing:
        for node in self.exported.graph.nodes:
            idle = node not in self.live
            ctx = Context(self.typing, node.name, source_line(node), idle=idle)
            if node.op == "placeholder":
                self._placeholder(ctx, node)
            elif node.op == "call_function":
                self._call(ctx, node)
        self._freeze_outputs()
        self._freeze_unread()
        return self.typing

    def _placeholder(self, ctx: Context, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        spec = self.specs[node.name]
        sizes = self._sizes(value)
        if spec.kind in _STATE:
            name = self.aliases.get(spec.target or "", spec.target or "")
            dims = self.typing.parameters.get(name) or self._state(name, sizes)
            if name in self.typing.stored:
                self.typing.points[node.name] = (self.typing.stored[name],)
            self.typing.parameters[name] = dims
            self.typing.parameters[spec.target or name] = dims
            stored = self._stored(name)
            if len(dims) == 1 and _holds_indices(stored):
                self.places[node.name] = stored.numpy(force=True).astype(np.int64)
        else:
            dims = tuple(ctx.fresh(s, "a dimension of a model input") for s in sizes)
        self.typing.values[node.name] = (dims,)

    def _state(self, name: str, sizes: Sizes) -> Dims:
        """New axes for a parameter or buffer; a permutation re-indexes what it points into."""
        dims = tuple(Atom(s.size, name) if s.size != 1 else UNIT for s in sizes)
        value = self._stored(name)
        if len(dims) == 1 and _holds_indices(value):
            order = Select(dims[0], value.numpy(force=True).astype(np.int64))
            if order.inverse is not None:
                self.typing.stored[name] = Points(dims[0], stored=True)
                return (order,)
        return dims

    def _stored(self, name: str) -> Any:
        return self.exported.state_dict.get(name, self.exported.constants.get(name))

    def _sizes(self, value: torch.Tensor) -> Sizes:
        return tuple(self.sizes.size(s) for s in value.shape)

    def _call(self, ctx: Context, node: fx.Node) -> None:
        results = self._results(node)
        if node.target is python_operator.getitem and isinstance(node.args[0], fx.Node):
            source = self.typing.values.get(node.args[0].name)
            if source is not None and isinstance(node.args[1], int):
                self.typing.values[node.name] = (source[node.args[1]],)
                points = self.typing.points.get(node.args[0].name)
                if points is not None:
                    self.typing.points[node.name] = (points[node.args[1]],)
                return
        op = self._operator(node, results)
        if any(r is not None for r in results):
            self.typing.values[node.name] = self._apply(ctx, node, op)
        if op.name in ACTIVATIONS and op.operands:
            for e in op.operands[0].dims:
                ctx.hint(e, "activation")
        if not op.name.startswith(_ABOUT_SHAPES):
            self._note_points(ctx, op)
        if op.name in _SAME_VALUES and op.operands and op.operands[0].value is not None:
            self.places[node.name] = op.operands[0].value

    def _note_points(self, ctx: Context, op: Operator) -> None:
        """Keep what the results point into."""
        carries = op.name in CARRIERS and op.get("dtype") != torch.bool
        settle_points(ctx, op, carries=carries)
        if ctx.given:
            self.typing.points[ctx.node] = tuple(ctx.given.get(i) for i in range(len(op.results)))

    def _apply(self, ctx: Context, node: fx.Node, op: Operator) -> tuple[Dims, ...]:
        rule = find_op(op.name).axes
        if rule is None and _is_pointwise(node.target):
            rule = elementwise_each
        return tuple(apply_rule(ctx, op, rule))

    def _results(self, node: fx.Node) -> tuple[Sizes | None, ...]:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else (value,)
        return tuple(self._sizes(v) if isinstance(v, torch.Tensor) else None for v in values)

    def _operator(self, node: fx.Node, results: tuple[Sizes | None, ...]) -> Operator:
        dynamic: set[str] = set()
        arguments: dict[str, Any] = {}
        for name, value in _bind(node).items():
            arguments[name] = self._argument(value, name, dynamic)
        return Operator(_name(node.target), arguments, results, frozenset(dynamic))

    def _argument(self, value: Any, name: str, dynamic: set[str]) -> Any:
        if isinstance(value, list | tuple):
            return [self._argument(v, name, dynamic) for v in value]
        if isinstance(value, fx.Node):
            known = self.typing.values.get(value.name)
            if known is not None:
                points = self.typing.points.get(value.name, (None,))[0]
                return Operand(known[0], points, self.places.get(value.name))
            value = value.meta.get("val")
        if isinstance(value, torch.SymInt):
            size = self.sizes.size(value)
            if size.dynamic:
                dynamic.add(name)
            return size.size
        return value

    def _freeze_outputs(self) -> None:
        kinds = {
            s.arg.name: s.kind
            for s in self.exported.graph_signature.output_specs
            if hasattr(s.arg, "name")
        }
        nodes = {node.name: node for node in self.exported.graph.nodes}
        for name, kind in kinds.items():
            why = "a dimension of a model output"
            if kind != OutputKind.USER_OUTPUT:
                why = "a dimension of updated state"
            ctx = Context(self.typing, name, source_line(nodes[name]) if name in nodes else "")
            for dims in self.typing.values.get(name, ()):
                for d in dims:
                    ctx.freeze(d, why)
            for points in self.typing.points.get(name, ()):
                if points is not None:
                    points.as_numbers(ctx.reason("its indices are a model output"))

    def _freeze_unread(self) -> None:
        """Freeze the state that no operator reads: nothing ties its sizes to the model."""
        unread: dict[str, bool] = {}
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" and self.specs[node.name].kind in _STATE:
                target = self.specs[node.name].target or ""
                name = self.aliases.get(target, target)
                unread[name] = unread.get(name, True) and node not in self.live
        axes = {n: [a for d in self.typing.parameters.get(n, ()) for a in atoms(d)] for n in unread}
        tied = {a for n, nobody in unread.items() if not nobody for a in axes[n]}
        for name, nobody in unread.items():
            for atom in axes[name] if nobody else ():
                if atom not in tied:  # an operator of no consequence may have tied it all the same
                    Context(self.typing, name).freeze(atom, "no operator reads it")


def _holds_indices(value: Any) -> bool:
    known = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return known and value.dtype in _INDICES and not value.is_meta


def _bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by schema name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).replace("::", ".")
    return str(getattr(target, "__name__", target))


def _is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())
