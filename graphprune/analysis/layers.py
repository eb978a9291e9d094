"""Layers: blocks of a stack whose residual path lets the graph go on without them.

A stack is a module list: values whose modules are ``path.0``, ``path.1``, ... A block can be
removed when the rest of the graph reads one value of it, and that value is its input plus
something, so that the input can take its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

import networkx as nx
import torch
from torch import fx
from torch.export import ExportedProgram

from graphprune.analysis.residual import residual_sums
from graphprune.axes import Atom, atoms, normal
from graphprune.ops import Typing
from graphprune.program import Block

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
    members: dict[str, dict[int, set[fx.Node]]] = defaultdict(lambda: defaultdict(set))
    for node in exported.graph.nodes:
        if node.op == "call_function":
            for stack, index in _positions(module_path(node)):
                members[stack][index].add(node)
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    readers = _readers(exported.graph, targets, aliases)
    skips = _residual_graph(exported.graph)
    result = {}
    for stack, blocks in members.items():
        found = [
            block
            for index, nodes in sorted(blocks.items())
            if (block := _block(index, f"{stack}.{index}.", nodes, typing, targets, readers, skips))
        ]
        if len(blocks) > 1 and found:
            result[stack] = (max(blocks) + 1, found)
    return _disjoint(result, typing)


def _positions(path: str) -> Iterator[tuple[str, int]]:
    parts = path.split(".")
    for i, part in enumerate(parts):
        if i and part.isdigit():
            yield ".".join(parts[:i]), int(part)


def _readers(
    graph: fx.Graph, targets: Mapping[str, str], aliases: Mapping[str, str]
) -> dict[str, set[fx.Node]]:
    """Parameter or buffer name to the nodes that read it under any of its names."""
    shared: dict[str, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            target = targets[node.name]
            shared[aliases.get(target, target)].update(node.users)
    return {t: shared[aliases.get(t, t)] for t in targets.values()}


def _residual_graph(graph: fx.Graph) -> nx.DiGraph[str]:
    """Edges along which a value passes unchanged but for additions and normalisations."""
    skips: nx.DiGraph[str] = nx.DiGraph()
    for node in graph.nodes:
        name = _schema_name(node)
        inputs = node.all_input_nodes
        if name in _ADD:
            skips.add_edges_from((i.name, node.name) for i in inputs)
        elif name in _PASS and inputs:
            skips.add_edge(inputs[0].name, node.name)
    return skips


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


def _block(
    index: int,
    prefix: str,
    nodes: set[fx.Node],
    typing: Typing,
    targets: Mapping[str, str],
    readers: Mapping[str, set[fx.Node]],
    skips: nx.DiGraph[str],
) -> Block | None:
    nodes = _without_outer_sizes(nodes)
    exits = [n for n in nodes if any(u not in nodes for u in n.users)]
    if len(exits) != 1 or not _is_tensor(exits[0]):
        return None
    last = exits[0]
    outside = {i for n in nodes for i in n.all_input_nodes if i not in nodes}
    state = {n for n in outside if n.name in targets}
    entries = [
        n
        for n in outside - state
        if _is_tensor(n) and _alike(n, last, typing) and _adds_to(skips, n, last, nodes)
    ]
    if len(entries) != 1:
        return None
    below = [t for t in targets.values() if t.startswith(prefix)]
    owned = [targets[n.name] for n in state if readers[targets[n.name]] <= nodes]
    parameters = tuple(sorted({*owned, *below}))
    if not parameters or any(not p.startswith(prefix) for p in owned):
        return None
    if any(not readers[t] <= nodes for t in below):  # tied to a parameter outside
        return None
    names = frozenset(n.name for n in nodes)
    return Block(index, entries[0].name, last.name, names, parameters)


def _without_outer_sizes(nodes: set[fx.Node]) -> set[fx.Node]:
    """`nodes` less the sizes that are computed in a block but not from its tensors.

    Export makes the node of a size where it is first asked for; later blocks share it.
    """
    inside: set[fx.Node] = set()
    for node in sorted(nodes):
        is_size = isinstance(node.meta.get("val"), int | float | bool | torch.SymInt)
        if not is_size or any(i in inside for i in node.all_input_nodes):
            inside.add(node)
    return inside


def _schema_name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _adds_to(
    skips: nx.DiGraph[str], source: fx.Node, target: fx.Node, nodes: Collection[fx.Node]
) -> bool:
    """Whether `target` is `source` with something added on the way; a mere norm adds nothing."""
    sums = [n.name for n in nodes if _schema_name(n) in _ADD]
    return any(
        _leads_to(skips, source.name, add) and _leads_to(skips, add, target.name) for add in sums
    )


def _leads_to(skips: nx.DiGraph[str], source: str, target: str) -> bool:
    return source in skips and target in skips and nx.has_path(skips, source, target)


def _alike(a: fx.Node, b: fx.Node, typing: Typing) -> bool:
    x, y = typing.values.get(a.name, ()), typing.values.get(b.name, ())
    same_axes = [list(map(normal, d)) for d in x] == [list(map(normal, d)) for d in y]
    return same_axes and a.meta["val"].dtype == b.meta["val"].dtype


def _disjoint(
    stacks: dict[str, tuple[int, list[Block]]], typing: Typing
) -> dict[str, tuple[int, list[Block]]]:
    """Of stacks inside blocks of others, one level: the outer one, unless it is of stages.

    Stages have stacks of different widths in them, and taking out a whole one is no fine cut.
    """

    def widths(path: str) -> set[Atom]:
        exits = (b.exit for b in stacks[path][1])
        return {a for v in exits for dims in typing.values[v] for d in dims for a in atoms(d)}

    dropped: set[str] = set()
    for path in sorted(stacks, key=len):
        inside = [other for other in stacks if other.startswith(f"{path}.")]
        if path in dropped or not inside:
            continue
        if set[Atom]().union(*map(widths, inside)) <= widths(path):
            dropped.update(inside)
        else:
            dropped.add(path)
    return {path: found for path, found in stacks.items() if path not in dropped}
