"""Rewriting a torch graph for a selection: layers cut out, size constants recomputed."""

from __future__ import annotations

import contextlib
import operator as python_operator
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from graphprune.axes import Dims, Keep, counter
from graphprune.errors import GraphPruneError
from graphprune.exclusive import one_at_a_time
from graphprune.ir.torch.constants import asks_for_values
from graphprune.ir.torch.infer import source_line
from graphprune.ir.torch.program import Program
from graphprune.ops import find_op
from graphprune.plan.plan import Selection
from graphprune.rewrite.sizes import Call, Constant, Dense, Scaled

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
CONSTANT = "graphprune_constant"  # in the metadata of placeholders that were operators

# Checks that export leaves behind; they repeat metadata that pruning changes.
_CHECKS = {"aten::_assert_tensor_metadata"}


def rewrite_graph(program: Program, selection: Selection) -> fx.Graph:
    """The graph of the slim model, with parameters still as placeholders.

    Args:
        program: the dense program; not changed.
        selection: what stays.

    Returns:
        A new graph whose nodes have the original names. Values of removed layers are gone, and
        so are placeholders of removed parameters. Metadata ("val") is the dense model's for
        everything but shapes: see `propagate_metadata`.
    """
    source = program.exported.graph
    replaced = {b.exit: b.entry for blocks in selection.cuts.values() for b in blocks}
    removed = selection.removed_nodes
    targets = {s.arg.name: s.target for s in program.exported.graph_signature.input_specs}
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def resolve(node: fx.Node) -> fx.Node:
        name = node.name
        while name in replaced:
            name = replaced[name]
        return made[name]

    for node in source.nodes:
        if node.name in removed or _schema_name(node) in _CHECKS:
            continue
        target = targets.get(node.name)
        canonical = program.aliases.get(target, target) if target else None
        if node.op == "placeholder" and canonical in selection.removed_parameters:
            continue
        # Arguments are set once, when they are known: fx looks through all those that it is given.
        new = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        if new.name != node.name:  # a graph of its own renames what is called like a builtin
            new.name = node.name
        new.meta = node.meta.copy()
        made[node.name] = _rewrite_call(node, new, program, selection, resolve)
    _drop_dead_code(graph)
    return graph


def _rewrite_call(
    node: fx.Node, new: fx.Node, program: Program, selection: Selection, resolve: Any
) -> fx.Node:
    """Give the copy `new` of `node` its slim arguments; returns what takes its place."""
    rule = None
    typing = program.typing
    if node.name in typing.values and node.name not in typing.opaque:
        rule = find_op(_schema_name(node).replace("::", ".")).sizes
    if node.op != "call_function" or rule is None:
        new.args = fx.map_arg(node.args, resolve)
        if node.kwargs:
            new.kwargs = fx.map_arg(node.kwargs, resolve)
        return new
    schema = node.target._schema  # type: ignore[union-attr]
    names = [a.name for a in schema.arguments]
    call = Call(node, {**dict(zip(names, node.args, strict=False)), **node.kwargs},
                program.typing, selection.keep)  # fmt: skip
    try:
        rule(call)
    except ValueError as error:
        raise GraphPruneError(
            "this plan needs a shape that the graph can't express",
            where=node.name,
            why=str(error),
            hint="leave the structures of this operator whole (`exclude`)",
        ) from error
    if node.target is torch.ops.aten.view.default:
        # Kernels choose other strides for other sizes, and a view insists on them.
        new.target = torch.ops.aten.reshape.default
        call.arguments["shape"] = call.arguments.pop("size")
        names = [a.name for a in new.target._schema.arguments]
    if call.constant is not None:
        made = _constant(new, f"c_{node.name}", call.constant, node, program)
        dtype = node.meta["val"].dtype
        if call.constant.dtype != dtype:
            new.target, new.args, new.kwargs = torch.ops.aten.to.dtype, (made, dtype), {}
            return new
        new.graph.erase_node(new)
        return made
    if call.target is not None:
        new.target = call.target
        names = [a.name for a in call.target._schema.arguments]
    positional = [n for n in names if n in call.arguments]
    _set_arguments(new, {
        n: _made(fx.map_arg(call.arguments[n], resolve), new, program, resolve) for n in positional
    })  # fmt: skip
    return new


def _made(value: Any, new: fx.Node, program: Program, resolve: Any) -> Any:
    """`value` with nodes in place of scaled sizes and constants."""
    if isinstance(value, list | tuple):
        return [_made(v, new, program, resolve) for v in value]
    if isinstance(value, Constant):
        return _constant(new, f"c_{new.name}", value.value, value.instead, program)
    if isinstance(value, Dense):
        with new.graph.inserting_before(new):
            return new.graph.call_function(
                torch.ops.aten.clone.default,
                (resolve(value.value),),
                {"memory_format": torch.contiguous_format},
            )
    if not isinstance(value, Scaled):
        return value
    size, name = resolve(value.size), "pruned_size"  # a name that no operator has
    with new.graph.inserting_before(new):
        for target, number in zip(
            (python_operator.mul, python_operator.floordiv),
            value.factor.as_integer_ratio(),
            strict=False,
        ):
            size = new.graph.create_node("call_function", target, (size, number), name=name)
    return size


def _constant(
    new: fx.Node, name: str, value: torch.Tensor, instead: fx.Node, program: Program
) -> fx.Node:
    """Put a constant among the placeholders, before those of the inputs.

    Args:
        new: a node of the slim graph.
        name: what to call the placeholder.
        value: the constant.
        instead: the dense value whose place it takes.
        program: the dense program.
    """
    graph = new.graph
    own = {n.name for n in graph.nodes if n.op == "placeholder"}
    inputs = own.intersection(program.exported.graph_signature.user_inputs)
    place = next(n for n in graph.nodes if n.op != "placeholder" or n.name in inputs)
    with graph.inserting_before(place):
        placeholder = graph.placeholder(name)
    dense = instead.meta["val"]
    placeholder.meta = {"val": dense.to(value.dtype), CONSTANT: value.to(dense.device)}
    return placeholder


def graph_constants(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """What `rewrite_graph` computed instead of leaving it to the graph, by placeholder."""
    return {n.name: n.meta[CONSTANT] for n in graph.nodes if CONSTANT in n.meta}


def _set_arguments(node: fx.Node, arguments: dict[str, Any]) -> None:
    """Arguments in the form that export writes: positional up to the first keyword-only one."""
    args: list[Any] = []
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        if argument.kwarg_only or argument.name not in arguments:
            break
        args.append(arguments.pop(argument.name))
    node.args = tuple(args)
    if arguments:
        node.kwargs = arguments


def _schema_name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _drop_dead_code(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)


@one_at_a_time
def check_shapes(
    graph: fx.Graph,
    program: Program,
    selection: Selection,
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, Any],
) -> None:
    """Run the slim graph on meta tensors of the example's sizes; compare all shapes with the axes.

    Args:
        graph: the slim graph.
        program: the dense program.
        selection: what stays.
        shapes: shape of every parameter placeholder, by its name in the graph.
        known: values that follow from constants, by name; see `graphprune.ir.torch.constants`.

    Raises:
        GraphPruneError: an operator fails, or a shape differs from what the axes say (a fault of
            ours).
    """
    inputs = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            inputs.append(value)
            continue
        shape = shapes.get(node.name)
        if shape is None:
            shape = tuple(d.size for d in program.typing.values[node.name][0])
        inputs.append(torch.empty(shape, dtype=value.dtype, device="meta"))
    # An operator without a meta kernel, or one that asks for values that only inputs give, ends the
    # check here; `verify` runs it for real.
    with torch.no_grad(), contextlib.suppress(NotImplementedError):
        _ShapeCheck(graph, program, selection.keep, known).run(*inputs)


class _ShapeCheck(fx.Interpreter):
    """Interprets a graph on the meta device, where tensors have shapes but no data.

    Equal calls (the same operator on tensors of the same shapes) are made once: a model repeats
    itself in every layer.
    """

    def __init__(
        self, graph: fx.Graph, program: Program, keep: Keep, known: Mapping[str, Any]
    ) -> None:
        super().__init__(program.exported.graph_module, graph=graph)
        self._known = known
        self._values = program.typing.values
        self._count = counter(keep)
        self._counts: dict[int, int] = {}
        self._results: dict[Any, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        asking = asks_for_values(n)
        try:
            if asking and n.name in self._known:
                result = fx.node.map_aggregate(self._known[n.name], _without_data)
            elif asking:
                result = self._ask(n)
            elif n.op == "call_function":  # without what `Interpreter` notes for those that trace
                args, kwargs = fx.map_arg((n.args, n.kwargs), self.env.__getitem__)
                result = self.call_function(n.target, args, kwargs)
            else:
                result = super().run_node(n)
        except NotImplementedError:
            raise
        except Exception as error:
            if asking:
                raise NotImplementedError from error
            raise _wrong_shape(n, str(error).strip().splitlines()[0][:200]) from error
        dims = self._values.get(n.name)
        if dims is not None and isinstance(result, torch.Tensor):
            wanted = self._shape(dims[0])
            if tuple(result.shape) != wanted and not free_unbacked_symbols(n.meta.get("val")):
                raise _wrong_shape(n, f"its axes say {wanted}, the graph {tuple(result.shape)}")
        return result

    def _ask(self, n: fx.Node) -> Any:
        """The result of an operator that needs the values of operands, of those that have any."""
        target: Any = n.target
        args, kwargs = fx.map_arg(
            (n.args, n.kwargs), lambda operand: self._known.get(operand.name, self.env[operand])
        )
        return target(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):  # a branch asks for values
            raise NotImplementedError
        key = target, _facts(args), tuple((k, _facts(v)) for k, v in kwargs.items())
        if key not in self._results:
            self._results[key] = super().call_function(
                target, fx.node.map_aggregate(args, _moved), fx.node.map_aggregate(kwargs, _moved)
            )
        return self._results[key]

    def _shape(self, dims: Dims) -> tuple[int, ...]:
        for e in dims:
            if id(e) not in self._counts:
                self._counts[id(e)] = self._count(e)
        return tuple(self._counts[id(e)] for e in dims)


def _without_data(x: Any) -> Any:
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def _moved(x: Any) -> Any:
    return torch.device("meta") if isinstance(x, torch.device) else x


def _facts(x: Any) -> Any:
    """What a result's shape and type depend on, as something hashable.

    Equal numbers of other types (1, 1.0, True) make results of other types.
    """
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype, x.stride()
    if isinstance(x, list | tuple):
        return tuple(map(_facts, x))
    return type(x), x


def _wrong_shape(node: fx.Node, why: str) -> GraphPruneError:
    return GraphPruneError(
        "the rewritten graph has a wrong shape",
        where=" ".join(p for p in (node.name, _schema_name(node), source_line(node)) if p),
        why=why,
        hint="please report this; leaving the structure whole (`exclude`) avoids it",
    )


@one_at_a_time
def propagate_metadata(
    graph_module: fx.GraphModule, program: Program, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Recompute the symbolic metadata of every value, as `torch.export` files need it.

    Args:
        graph_module: the slim graph; its nodes' "val" is replaced.
        program: the dense program.
        shapes: shape of every parameter placeholder, by its name in the graph.
    """
    values = (n.meta.get("val") for n in program.exported.graph.nodes)
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    inputs = []
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if node.name in shapes:
            with mode:
                shape = shapes[node.name]
                value = torch.empty(shape, dtype=value.dtype, device=value.device)
        inputs.append(value)
    # What a kernel would decide by the sizes of the example must not become a bound of the graph:
    # depthwise convolutions ask whether there are 16 samples.
    unguarded = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    # Symbolic sizes need Python kernels.
    with torch.no_grad(), enable_python_dispatcher(), unguarded:
        _Propagation(graph_module, mode).propagate_dont_convert_inputs(*inputs)


class _Propagation(FakeTensorProp):
    """Numbers that the graph reads off tensors keep their symbols, of which ranges are known."""

    def run_node(self, n: fx.Node) -> Any:
        number = n.meta.get("val")
        if asks_for_values(n) and isinstance(number, _NUMBERS):
            return number
        return super().run_node(n)
