"""Operators without a rule, taken apart into operators that have one.

Many operators are defined by others: ``multiply`` is ``mul``, ``special.softmax`` is ``softmax``,
``inner`` is ``tensordot``. Where axis inference has no rule for such an operator, torch's own
definition takes its place, if inference can follow all of that. Each operator is traced by itself,
on the shapes it has in the graph, so that the cost grows with the number of such operators only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from graphprune.ir.torch.liveness import live_nodes
from graphprune.ops.torch import find_op

_DEPTH = 8
"""How deep definitions may be nested; those of torch are two or three deep."""
_TRACED = ("val", "tensor_meta")
"""What tracing finds out about a value; other metadata is that of the operator taken apart."""
_SIZES = {
    "aten::view": "size",
    "aten::reshape": "shape",
    "aten::_unsafe_view": "size",
    "aten::unflatten": "sizes",
    "aten::split_with_sizes": "split_sizes",
}
"""Operators that take a tensor's own size as an argument, which the rewriter computes anew."""


_REPORTS = logging.getLogger("torch.fx.experimental.symbolic_shapes")


class _Unfit(Exception):
    """A definition that can't take an operator's place."""


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """`exported`, with operators that have no rule replaced by their definitions.

    An operator stays whole where its definition ends in operators without a rule, writes to
    tensors, draws random numbers, holds only for some sizes of a dynamic dimension, or computes
    with the size of a dimension that may be pruned.

    Args:
        exported: a program without in-place operators; may be changed.

    Returns:
        A program that computes the same values, under the same names.
    """
    live = live_nodes(exported.graph)
    changed = False
    for node in list(exported.graph.nodes):
        if node in live and not _has_rule(node):
            try:
                _replace(node, _definition(node))
            except _Unfit:
                continue
            changed = True
    if changed:
        exported.graph_module.recompile()
    return exported


def _has_rule(node: fx.Node) -> bool:
    """Whether inference follows `node`, which it does where no tensor is involved, too."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    name = node.target._schema.name.replace("::", ".")
    about_shapes = not any(isinstance(v, torch.Tensor) for v in _values(node))
    has_rule = find_op(name).axes is not None
    return about_shapes or torch.Tag.pointwise in node.target.tags or has_rule


def _values(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _definition(node: fx.Node, depth: int = 0) -> fx.Graph:
    """What computes `node`, as a graph of operators with rules.

    Its placeholders stand for the operands, in their order.

    Raises:
        _Unfit: torch has no such definition.
    """
    if depth == _DEPTH:
        raise _Unfit
    kernel = _kernel(node.target)
    operands = [operand.meta.get("val") for operand in node.all_input_nodes]
    graph = _trace(node, kernel, operands)
    _check_sizes(graph, _trace(node, kernel, list(map(_doubled, operands))))
    for inner in list(graph.nodes):
        if inner.op == "get_attr" or _is_mutable(inner.target):
            raise _Unfit
        if not _has_rule(inner):
            _replace(inner, _definition(inner, depth + 1))
    return graph


def _kernel(target: Any) -> Callable[..., Any]:
    """The function by which torch defines an operator."""
    if torch.Tag.nondeterministic_seeded in target.tags or _is_mutable(target):
        raise _Unfit
    if target._can_decompose():
        kernel: Callable[..., Any] = target.decompose
        return kernel
    if target in decomposition_table:
        return decomposition_table[target]
    raise _Unfit


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _trace(node: fx.Node, kernel: Callable[..., Any], operands: list[Any]) -> fx.Graph:
    """Record what `kernel` does at `node`, one level deep, with `operands` as its operands."""
    inputs = node.all_input_nodes
    target: Any = node.target

    def call(function: Callable[..., Any], *given: Any) -> Any:
        known = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return function(*args, **kwargs)

    mode = next((v.fake_mode for v in operands if isinstance(v, FakeTensor)), None)
    if mode is None:
        raise _Unfit
    try:
        with torch.no_grad(), mode, _unguarded(mode):
            whole = partial(call, target)
            graph = make_fx(whole, {target: kernel}, pre_dispatch=True)(*operands).graph
            if any(_is_mutable(inner.target) for inner in graph.nodes):
                graph = make_fx(dispatch_functionalize(partial(call, kernel)))(*operands).graph
    except Exception as error:  # whatever a definition raises on these operands
        raise _Unfit from error
    graph.eliminate_dead_code()
    return graph


@contextmanager
def _unguarded(mode: FakeTensorMode) -> Iterator[None]:
    """Refuse a definition that asks how large a dynamic dimension is."""
    shape_env: Any = mode.shape_env
    if shape_env is None:
        yield
        return
    known = len(shape_env.guards)
    raising = getattr(shape_env, "error_on_new_guards", nullcontext)  # not in torch 2.11
    reports = _REPORTS.disabled
    _REPORTS.disabled = True  # torch reports the question as a failure
    try:
        with raising():
            yield
    finally:
        _REPORTS.disabled = reports
    if len(shape_env.guards) > known:
        raise _Unfit


def _doubled(value: Any) -> Any:
    """A tensor like `value` with every fixed size doubled, laid out in memory as it is."""
    if not isinstance(value, FakeTensor):
        return value
    shape = [2 * s if type(s) is int and s > 1 else s for s in value.shape]
    order = list(range(value.dim()))
    if all(type(stride) is int for stride in value.stride()):
        order.sort(key=value.stride, reverse=True)
    with value.fake_mode:
        return torch.empty_permuted(shape, order, dtype=value.dtype, device=value.device)


def _check_sizes(graph: fx.Graph, doubled: fx.Graph) -> None:
    """Refuse a definition that computes with sizes: those of a pruned axis are others.

    Args:
        graph: the definition, traced on the operands' sizes.
        doubled: the definition, traced on twice those sizes.
    """
    pairs = list(zip(graph.nodes, doubled.nodes, strict=False))
    if len(graph.nodes) != len(doubled.nodes) or any(a.target != b.target for a, b in pairs):
        raise _Unfit
    for a, b in pairs:
        if a.op == "call_function":
            given, other = _arguments(a), _arguments(b)
            if given.keys() != other.keys() or any(given[n] != other[n] for n in given):
                raise _Unfit


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The numbers that a call is given, without sizes that a tensor has already."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else map(str, range(99))
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    operator = schema.name if schema is not None else ""
    given.pop(_SIZES.get(operator, ""), None)
    if operator == "aten::expand":
        source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        sizes = given["size"]
        own = [None] * (len(sizes) - len(source)) + list(source)
        given["size"] = [-1 if n is s or n == s else n for n, s in zip(sizes, own, strict=True)]
    return {name: _numbers(value) for name, value in given.items()}


def _numbers(argument: Any) -> Any:
    """An argument with nodes left out."""
    return fx.map_arg(argument, lambda _: None)


def _replace(node: fx.Node, definition: fx.Graph) -> None:
    """Put a definition in the place of `node`; results keep their names."""
    graph = node.graph
    made: dict[fx.Node, fx.Node] = dict(
        zip(definition.find_nodes(op="placeholder"), node.all_input_nodes, strict=True)
    )
    around = {k: v for k, v in node.meta.items() if k not in _TRACED}
    new: set[fx.Node] = set()
    with graph.inserting_before(node):
        for inner in definition.nodes:
            if inner.op == "call_function":
                copy = graph.node_copy(inner, made.__getitem__)
                copy.meta = {**around, **{k: inner.meta[k] for k in _TRACED if k in inner.meta}}
                made[inner] = copy
                new.add(copy)
    result: Any = fx.map_arg(definition.output_node().args[0], made.__getitem__)
    if isinstance(result, fx.Node):
        _take_over(node, result, new)
        return
    for user in list(node.users):  # each takes one of several results
        _take_over(user, result[user.args[1]], new)
    graph.erase_node(node)


def _take_over(old: fx.Node, result: fx.Node, new: set[fx.Node]) -> None:
    """Use `result` wherever `old` is used, under its name, which signatures hold.

    Args:
        old: leaves the graph.
        result: what has its value; another name of it is made if it isn't in `new`.
        new: values that have no name yet that counts; `result` leaves them.
    """
    graph = old.graph
    if result in new:
        new.remove(result)
    else:
        with graph.inserting_before(old):
            result = graph.call_function(torch.ops.aten.alias.default, (result,))
    result.meta = dict(old.meta)
    old.replace_all_uses_with(result)
    graph.erase_node(old)
    result.name = old.name
