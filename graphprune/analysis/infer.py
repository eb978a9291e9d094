"""Axis inference over an exported torch graph: one pass, one rule per operator."""

from __future__ import annotations

import operator as python_operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from graphprune.analysis.sizes import ExampleSizes
from graphprune.axes import UNIT, Atom, Dims
from graphprune.ops import ATEN, Context, Operand, Operator, RuleError, Sizes, Typing
from graphprune.ops.pointwise import elementwise, opaque

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
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
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    return f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}" if own else ""


class _Inference:
    def __init__(self, exported: ExportedProgram, aliases: Mapping[str, str]) -> None:
        self.exported = exported
        self.aliases = aliases
        self.sizes = ExampleSizes(exported)
        self.typing = Typing()
        self.specs = {s.arg.name: s for s in exported.graph_signature.input_specs}

    def run(self) -> Typing:
        for node in self.exported.graph.nodes:
            ctx = Context(self.typing, node.name, source_line(node))
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
            known = self.typing.parameters.get(name)
            dims = known or tuple(Atom(s.size, name) if s.size != 1 else UNIT for s in sizes)
            self.typing.parameters[name] = dims
            self.typing.parameters[spec.target or name] = dims
        else:
            dims = tuple(ctx.fresh(s, "a dimension of a model input") for s in sizes)
        self.typing.values[node.name] = (dims,)

    def _sizes(self, value: torch.Tensor) -> Sizes:
        return tuple(self.sizes.size(s) for s in value.shape)

    def _call(self, ctx: Context, node: fx.Node) -> None:
        results = self._results(node)
        if node.target is python_operator.getitem and isinstance(node.args[0], fx.Node):
            source = self.typing.values.get(node.args[0].name)
            if source is not None and isinstance(node.args[1], int):
                self.typing.values[node.name] = (source[node.args[1]],)
                return
        if not any(r is not None for r in results):
            return
        op = self._operator(node, results)
        self.typing.values[node.name] = self._apply(ctx, node, op)

    def _apply(self, ctx: Context, node: fx.Node, op: Operator) -> tuple[Dims, ...]:
        rule = ATEN.find(op.name)
        if rule is None and _is_pointwise(node.target):
            rule = elementwise
        if rule is None:
            return tuple(opaque(ctx, op, f"no rule for operator {op.name}"))
        try:
            given = rule(ctx, op)
            dims = tuple(given) if isinstance(given, list) else (given,)
            _check(dims, op)
        except RuleError as error:
            return tuple(opaque(ctx, op, f"{op.name}: {error}"))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            return tuple(opaque(ctx, op, f"the rule for {op.name} failed: {error!r}"))
        return dims

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
                return Operand(known[0])
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
        for name, kind in kinds.items():
            why = "a dimension of a model output"
            if kind != OutputKind.USER_OUTPUT:
                why = "a dimension of updated state"
            ctx = Context(self.typing, name)
            for dims in self.typing.values.get(name, ()):
                for d in dims:
                    ctx.freeze(d, why)


    def _freeze_unread(self) -> None:
        """Freeze the state that no operator reads: nothing ties its sizes to the model."""
        unread: dict[str, bool] = {}
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" and self.specs[node.name].kind in _STATE:
                target = self.specs[node.name].target or ""
                name = self.aliases.get(target, target)
                unread[name] = unread.get(name, True) and not node.users
        for name in (n for n, nobody in unread.items() if nobody):
            for d in self.typing.parameters.get(name, ()):
                Context(self.typing, name).freeze(d, "no operator reads it")


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


def _check(dims: tuple[Dims, ...], op: Operator) -> None:
    """Compare a rule's answer with the sizes that torch computed."""
    if len(dims) != len(op.results):
        raise RuleError(f"the rule gives {len(dims)} results, the graph {len(op.results)}")
    for given, known in zip(dims, op.results, strict=True):
        if known is not None and tuple(d.size for d in given) != tuple(s.size for s in known):
            sizes = [d.size for d in given], [s.size for s in known]
            raise RuleError(f"the rule gives sizes {sizes[0]}, the graph {sizes[1]}")
