"""Layers of a torch graph: see `graphprune.analysis.blocks`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.export import ExportedProgram

from graphprune.analysis.blocks import Flow, find_blocks
from graphprune.analysis.residual import residual_sums
from graphprune.analysis.structure import Block
from graphprune.axes import normal
from graphprune.ops import Typing

# Operators that a residual path may lead through: both operands of an addition, the first of
# the others.
_ADD = {"aten::add", "aten::add_"}
_PASS = {
    "aten::to", "aten::dropout", "aten::clone", "aten::contiguous", "aten::layer_norm",
    "aten::rms_norm", "aten::relu", "aten::view", "aten::reshape", "aten::_to_copy", "aten::alias",
}  # fmt: skip


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that `node` belongs to, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]).partition("@")[0] if paths else ""


def find_layers(
    exported: ExportedProgram, typing: Typing, aliases: Mapping[str, str]
) -> dict[str, tuple[int, list[Block]]]:
    """The removable blocks of every stack.

    Args:
        exported: the program.
        typing: its axes.
        aliases: tied parameter name to the name that stands for it.

    Returns:
        Path of the stack to its number of blocks and those that can be removed, in order.
    """
    return find_blocks(flow_of(exported, typing, aliases), typing)


def flow_of(exported: ExportedProgram, typing: Typing, aliases: Mapping[str, str]) -> Flow:
    """What of a program matters to its layers; see `find_layers` for the arguments."""
    specs = exported.graph_signature.input_specs
    targets = {s.arg.name: s.target for s in specs if s.target}
    known = {node.name: node for node in exported.graph.nodes}
    nodes = [n for n in exported.graph.nodes if n.op not in ("placeholder", "output")]
    operands = {n.name: [i.name for i in n.all_input_nodes] for n in nodes}

    def alike(a: str, b: str) -> bool:
        x, y = typing.values.get(a, ()), typing.values.get(b, ())
        same_axes = [list(map(normal, d)) for d in x] == [list(map(normal, d)) for d in y]
        return same_axes and known[a].meta["val"].dtype == known[b].meta["val"].dtype

    return Flow(
        inputs=operands,
        paths={n.name: module_path(n) for n in nodes if n.op == "call_function"},
        outputs=frozenset(i.name for i in exported.graph.output_node().all_input_nodes),
        parameters={v: name for v, name in targets.items() if v in known},
        sums={n.name: _added(n) for n in nodes if _schema_name(n) in _ADD},
        passes={
            n.name: operands[n.name][0]
            for n in nodes
            if _schema_name(n) in _PASS and operands[n.name]
        },
        tensors=frozenset(v for v, n in known.items() if isinstance(_value(n), torch.Tensor)),
        sizes=frozenset(
            n.name for n in nodes if isinstance(_value(n), int | float | bool | torch.SymInt)
        ),
        alike=alike,
        named=True,
        aliases=aliases,
    )


def sums_of(graph: fx.Graph, typing: Typing) -> list[str]:
    """Names of the residual sums of a torch graph."""
    products = {name for name, _ in typing.contractions}
    found = residual_sums(
        graph.nodes,
        lambda node: node.all_input_nodes,
        {n for n in graph.nodes if _schema_name(n) in _ADD},
        {n for n in graph.nodes if n.name in products},
    )
    return [node.name for node in found]


def _added(node: fx.Node) -> list[str]:
    """What an addition adds unchanged: without the second operand where that is scaled."""
    scaled = node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2
    read = [n.name for n in node.all_input_nodes]
    return [n for n in read if n == getattr(node.args[0], "name", None)] if scaled else read


def _schema_name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _value(node: fx.Node) -> object:
    return node.meta.get("val")
