"""Blocks of a graph of any format: layers that the rest of the graph can go on without.

A stack is a list of modules: values whose modules are ``path.0``, ``path.1``, ... A block can be
removed when the rest of the graph reads one value of it, and that value is its input plus
something, so that the input can take its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx

from graphprune.analysis.structure import Block
from graphprune.axes import Atom, atoms
from graphprune.ops import Typing

_OUTSIDE = ""  # reads what the model returns


@dataclass(frozen=True)
class Flow:
    """What of a graph matters to its layers. Values are known by name.

    Attributes:
        inputs: what each computed value is computed from, in the order in which they run.
        paths: the module that computes a value, "encoder.layers.0.norm", or "".
        outputs: what the model returns.
        parameters: value to the name of the parameter or buffer that it is.
        sums: additions, with the values that they add.
        passes: normalisations and the like: value to the one that runs through it.
        tensors: values of the model's inputs and operators that are tensors.
        sizes: computed values that are sizes or made of them, and no data.
        alike: whether two tensors have the same axes and the same type.
        aliases: tied parameter name to the name that stands for it.
        named: whether the names of parameters begin with the paths of their modules.
        operators: name of the operator that computes a value, where `paths` say nothing.
    """

    inputs: Mapping[str, Sequence[str]]
    paths: Mapping[str, str]
    outputs: Collection[str]
    parameters: Mapping[str, str]
    sums: Mapping[str, Sequence[str]]
    passes: Mapping[str, str]
    tensors: Set[str]
    sizes: Set[str]
    alike: Callable[[str, str], bool]
    named: bool
    aliases: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def places(self) -> dict[str, int]:
        """Position of every computed value in the order in which they run."""
        return {value: i for i, value in enumerate(self.inputs)}

    @cached_property
    def users(self) -> dict[str, set[str]]:
        """The values that are computed from each."""
        users: dict[str, set[str]] = defaultdict(set)
        for value, inputs in self.inputs.items():
            for given in inputs:
                users[given].add(value)
        for value in self.outputs:
            users[value].add(_OUTSIDE)
        return users

    @cached_property
    def readers(self) -> dict[str, set[str]]:
        """The values that are computed from each parameter, under any of its names."""
        shared: dict[str, set[str]] = defaultdict(set)
        for value, name in self.parameters.items():
            shared[self.aliases.get(name, name)] |= self.users.get(value, set())
        return {n: shared[self.aliases.get(n, n)] for n in self.parameters.values()}

    @cached_property
    def skips(self) -> nx.DiGraph[str]:
        """Edges along which a value passes unchanged but for additions and normalisations."""
        skips: nx.DiGraph[str] = nx.DiGraph()
        skips.add_edges_from((given, value) for value, given in self.passes.items())
        skips.add_edges_from((given, v) for v, inputs in self.sums.items() for given in inputs)
        return skips


def find_blocks(flow: Flow, typing: Typing) -> dict[str, tuple[int, list[Block]]]:
    """The removable blocks of every stack.

    Args:
        flow: the graph.
        typing: its axes.

    Returns:
        Path of the stack to its number of blocks and those that can be removed, in order.
    """
    result = {}
    for stack, blocks in members(flow.paths).items():
        found = [_block(flow, i, f"{stack}.{i}.", nodes) for i, nodes in sorted(blocks.items())]
        removable = [block for block in found if isinstance(block, Block)]
        if len(blocks) > 1 and removable:
            result[stack] = (max(blocks) + 1, removable)
    return _disjoint(result, typing)


def fixed_blocks(flow: Flow) -> dict[str, str]:
    """Why blocks can't be removed: path of the block to the reason."""
    result = {}
    for stack, blocks in members(flow.paths).items():
        for index, nodes in sorted(blocks.items()) if len(blocks) > 1 else ():
            found = _block(flow, index, f"{stack}.{index}.", nodes)
            if isinstance(found, str):
                result[f"{stack}.{index}"] = found
    return result


def members(paths: Mapping[str, str]) -> dict[str, dict[int, set[str]]]:
    """The values of every block of every stack."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for value, path in paths.items():
        for stack, index in positions(path):
            found[stack][index].add(value)
    return found


def positions(path: str) -> Iterator[tuple[str, int]]:
    """The stacks that a module lies in, with its number in each, outer ones first."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if i and part.isdigit():
            yield ".".join(parts[:i]), int(part)


def leaving(flow: Flow, nodes: Collection[str], entries: Collection[str]) -> set[str]:
    """What leaves a graph with some blocks: their values, and what only these read.

    Args:
        flow: the graph.
        nodes: the values of the blocks.
        entries: what takes the places of blocks, and stays.

    Returns:
        Computed values, and parameters and constants that the graph stores.
    """
    gone = set(nodes)
    weights = flow.users.keys() - flow.inputs.keys() - flow.tensors
    for value in (*reversed(list(flow.inputs)), *weights):
        users = flow.users.get(value)
        if users and value not in gone and value not in entries and users <= gone:
            gone.add(value)
    return gone


def _block(flow: Flow, index: int, prefix: str, nodes: Collection[str]) -> Block | str:
    """A block, or why it can't be removed."""
    inside = _without_outer_sizes(flow, nodes)
    entries: list[str] = []
    if not flow.named:
        inside, entries = _without_outer_values(flow, inside)
    exits = _exits(flow, inside)
    if not exits:
        return "nothing reads it"
    if len(exits) > 1:
        returned = [v for v in exits if v in flow.outputs]
        if returned:
            return f"the model returns {_listed(returned)} of it"
        return f"the rest of the graph reads {_listed(exits)} of it"
    last = exits[0]
    if last not in flow.tensors:
        return f"the rest of the graph reads {last} of it, which is no tensor"
    entries = entries or _entries(flow, inside, last)
    if len(entries) != 1:
        return "its result is not its input plus something, with the same axes"
    if flow.named:
        owned = _owned_by_name(flow, prefix, inside)
    else:
        inside = leaving(flow, inside, entries)
        owned = {flow.parameters[v] for v in inside if v in flow.parameters}
        inside &= flow.inputs.keys()
    if owned is None:
        return "it shares parameters with the rest of the graph"
    if not owned:
        return "it has no parameters of its own"
    return Block(index, entries[0], last, frozenset(inside), tuple(sorted(owned)))


def _exits(flow: Flow, inside: Set[str]) -> list[str]:
    """The values of a block that are read outside of it."""
    found = [v for v in inside if flow.users.get(v, set()) - inside]
    return sorted(found, key=flow.places.__getitem__)


def _entries(flow: Flow, inside: Set[str], last: str) -> list[str]:
    """The values that a block reads and that could take the place of its result."""
    return [
        v
        for v in _read(flow, inside)
        if v not in flow.parameters
        and v in flow.tensors
        and flow.alike(v, last)
        and _adds_to(flow, v, last, inside)
    ]


def _read(flow: Flow, inside: Set[str]) -> list[str]:
    """What a block reads."""
    order = sorted(inside, key=flow.places.__getitem__)
    return list(dict.fromkeys(i for v in order for i in flow.inputs[v] if i not in inside))


def _owned_by_name(flow: Flow, prefix: str, inside: Set[str]) -> set[str] | None:
    """The parameters of a block; None where it shares some."""
    below = [name for name in flow.parameters.values() if name.startswith(prefix)]
    read = [flow.parameters[v] for v in _read(flow, inside) if v in flow.parameters]
    owned = {name for name in read if flow.readers[name] <= inside}
    if any(not name.startswith(prefix) for name in owned):
        return None
    if any(not flow.readers[name] <= inside for name in below):  # tied to a parameter outside
        return None
    return {*owned, *below}


def _listed(values: Sequence[str], most: int = 3) -> str:
    return ", ".join([*values[:most], *(["..."] if len(values) > most else [])])


def _without_outer_sizes(flow: Flow, nodes: Collection[str]) -> set[str]:
    """`nodes` less the sizes that are computed in a block but not from its tensors.

    Export makes the node of a size where it is first asked for; later blocks share it.
    """
    inside: set[str] = set()
    for value in sorted(nodes, key=flow.places.__getitem__):
        if value not in flow.sizes or any(i in inside for i in flow.inputs[value]):
            inside.add(value)
    return inside


def _without_outer_values(flow: Flow, inside: set[str]) -> tuple[set[str], list[str]]:
    """`inside` less what isn't computed from what could take the place of a result, and that.

    An exporter that computes equal things once leaves masks and position tables in the first of
    the layers that read them. What only this block reads leaves with it all the same.
    """
    for last in reversed(_exits(flow, inside)):
        entries = _entries(flow, inside, last) if last in flow.tensors else []
        if len(entries) == 1:
            below = {*entries}
            for value in sorted(inside, key=flow.places.__getitem__):
                if not below.isdisjoint(flow.inputs[value]):
                    below.add(value)
            return below & inside, entries
    return inside, []


def _adds_to(flow: Flow, source: str, target: str, nodes: Collection[str]) -> bool:
    """Whether `target` is `source` with something added on the way; a mere norm adds nothing."""
    return any(
        _leads_to(flow.skips, source, value) and _leads_to(flow.skips, value, target)
        for value in nodes
        if value in flow.sums
    )


def _leads_to(skips: nx.DiGraph[str], source: str, target: str) -> bool:
    return source in skips and target in skips and nx.has_path(skips, source, target)


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
