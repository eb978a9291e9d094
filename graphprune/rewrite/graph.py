"""Rewriting a torch graph for a selection: layers cut out, size constants recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphprune.axes import count
from graphprune.errors import GraphPruneError
from graphprune.plan import Selection
from graphprune.program import Program
from graphprune.rewrite.sizes import RULES, Call

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
        everything but shapes: see `propagate_shapes`.
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
        new = graph.node_copy(node, resolve)
        made[node.name] = new
        if node.op == "call_function":
            _rewrite_call(node, new, program, selection, resolve)
    _drop_dead_code(graph)
    return graph


def _rewrite_call(
    node: fx.Node, new: fx.Node, program: Program, selection: Selection, resolve: Any
) -> None:
    rule = RULES.get(_schema_name(node))
    if rule is None or node.name not in program.typing.values:
        return
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
    if call.target is not None:
        new.target = call.target
        names = [a.name for a in call.target._schema.arguments]
    positional = [n for n in names if n in call.arguments]
    new.args = ()
    new.kwargs = {n: fx.map_arg(call.arguments[n], resolve) for n in positional}
    _to_positional(new)


def _to_positional(node: fx.Node) -> None:
    """Arguments in the form that export writes: positional up to the first keyword-only one."""
    args: list[Any] = []
    kwargs = dict(node.kwargs)
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        if argument.kwarg_only or argument.name not in kwargs:
            break
        args.append(kwargs.pop(argument.name))
    node.args = tuple(args)
    node.kwargs = kwargs


def _schema_name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _drop_dead_code(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)


def propagate_shapes(
    graph_module: fx.GraphModule,
    program: Program,
    selection: Selection,
    state: dict[str, torch.Tensor],
) -> None:
    """Recompute the metadata of every value with fake tensors, and compare it with the axes.

    Args:
        graph_module: the slim graph; its nodes' metadata is replaced.
        program: the dense program.
        selection: what stays.
        state: placeholder name to a tensor of the slim shape (fake or meta) for parameters.

    Raises:
        GraphPruneError: a shape differs from what the axes say (a fault of ours).
    """
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = next(
        n.meta["val"].fake_mode
        for n in program.exported.graph.nodes
        if isinstance(n.meta.get("val"), torch._subclasses.FakeTensor)
    )
    inputs = []
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = state.get(node.name)
        if value is None:
            inputs.append(node.meta.get("val"))
            continue
        with mode:
            old = node.meta["val"]
            fake = torch.empty(value.shape, dtype=old.dtype, device=old.device)
            inputs.append(fake)
    with torch.no_grad():
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)
    for node in graph_module.graph.nodes:
        _compare(node, program, selection)


def _compare(node: fx.Node, program: Program, selection: Selection) -> None:
    values = node.meta.get("val")
    known = program.typing.values.get(node.name)
    if known is None or node.op == "output":
        return
    values = values if isinstance(values, list | tuple) else (values,)
    for value, dims in zip(values, known, strict=False):
        if not isinstance(value, torch.Tensor):
            continue
        for size, e in zip(value.shape, dims, strict=True):
            if isinstance(size, int) and size != count(e, selection.keep):
                raise GraphPruneError(
                    "the rewritten graph has a wrong shape",
                    where=node.name,
                    why=f"axis {e!r} should keep {count(e, selection.keep)}, the graph has {size}",
                    hint="please report this; leaving the structure whole (`exclude`) avoids it",
                )
