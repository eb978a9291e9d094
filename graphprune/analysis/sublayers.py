"""Residual branches inside layers, of a graph of any format: attention or MLP alone.

A layer of a transformer is a chain of sums ``x + f(x)``. Each f is a branch, and without it the
sum is x.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from graphprune.analysis.blocks import Flow, leaving
from graphprune.analysis.cost import CostModel
from graphprune.analysis.facts import GraphFacts
from graphprune.analysis.repeats import between
from graphprune.analysis.structure import Block, Structure
from graphprune.axes import Atom, atoms
from graphprune.ops import Typing

ATTENTION, MLP = "attention_blocks", "mlp_blocks"
SUBLAYERS = (ATTENTION, MLP)
"""Roles: branches with a product of queries and keys, and all others."""

_SUMS = ("Add", "Sum")  # of ONNX, where others do more than to add


def find_sublayers(program: GraphFacts, costs: CostModel) -> tuple[Structure, ...]:
    """The branches of a program's removable layers, where some layer has several.

    Units are the branches of one kind in a stack, in the order in which they run. What the rest of
    the graph reads more of than the sum is no unit.
    """
    stacks = [s for s in program.structures if s.blocks]
    if not stacks:
        return ()
    flow = program.flow()
    sums = set(program.residual_sums())
    queries, idle = _queries(program.typing), _idle(flow)
    found: list[Structure] = []
    for stack in stacks:
        chains = [_trunk(flow, block, sums) for block in stack.blocks]
        if max(map(len, chains)) < 2:
            continue
        kinds: dict[str, list[Block]] = defaultdict(list)
        for total in (v for chain in chains for v in chain):
            branch = _branch(flow, total, idle)
            if branch is not None:
                role = ATTENTION if _attends(program, branch, queries) else MLP
                kinds[role].append(branch)
        found += [_structure(costs, stack, r, kinds[r]) for r in SUBLAYERS if r in kinds]
    return tuple(found)


def _trunk(flow: Flow, block: Block, sums: Collection[str]) -> list[str]:
    """The sums on the way of the residual stream through a layer, in order."""
    order = sorted(block.nodes, key=flow.places.__getitem__)
    below = {block.entry}
    for value in order:
        if not below.isdisjoint(_before(flow, value)):
            below.add(value)
    above = {block.exit}
    for value in reversed(order):
        if value in above:
            above.update(_before(flow, value))
    return [v for v in order if v in sums and v in below and v in above and _is_plain(flow, v)]


def _before(flow: Flow, value: str) -> Iterable[str]:
    """The values that pass unchanged to `value`, but for additions and normalisations."""
    if value in flow.passes:
        return (flow.passes[value],)
    return flow.sums.get(value, ())


def _is_plain(flow: Flow, value: str) -> bool:
    added = len(set(flow.sums.get(value, ()))) == 2
    return added and (not flow.operators or flow.operators[value] in _SUMS)


def _idle(flow: Flow) -> set[str]:
    """The values that nothing which the model returns depends on."""
    waiting = list(flow.outputs)
    read = set(waiting)
    while waiting:
        for value in flow.inputs.get(waiting.pop(), ()):
            if value not in read:
                read.add(value)
                waiting.append(value)
    return flow.inputs.keys() - read


def _branch(flow: Flow, total: str, idle: set[str]) -> Block | None:
    """The branch that ends in a sum; None if more than the sum depends on it."""
    early, late = sorted(flow.sums[total], key=lambda v: flow.places.get(v, -1))
    if early not in flow.tensors or not flow.alike(early, total):
        return None
    # Checks of sizes and types, which nothing reads, hold nothing back.
    gone = leaving(flow, {*between(flow, early, late), total, *idle}, [early])
    inside = gone & flow.inputs.keys() - idle
    if any(not flow.users.get(v, set()) <= gone for v in inside - {total}):
        return None
    owned = {
        name for name in flow.parameters.values()
        if flow.readers[name] <= gone and not flow.readers[name].isdisjoint(inside)
    }  # fmt: skip
    if not owned:
        return None
    gone = inside | {v for v, name in flow.parameters.items() if name in owned}
    nodes = set(inside)
    for value in flow.inputs:
        if value in idle and not (gone | nodes).isdisjoint(flow.inputs[value]):
            nodes.add(value)
    return Block(0, early, total, frozenset(nodes), tuple(sorted(owned)))


def _queries(typing: Typing) -> set[Atom]:
    """The axes of queries, keys and values, as attention products and others like them hint."""
    return {a for e, role in typing.hints if role in ("qk_dim", "v_dim") for a in atoms(e)}


def _attends(program: GraphFacts, branch: Block, queries: Collection[Atom]) -> bool:
    """Whether a branch has parameters of queries, keys or values.

    The weights of chosen experts are multiplied like these, but are stacks of matrices; the axes
    of the residual stream and those of experts' matrices say nothing.
    """
    dims = program.typing.parameters
    stream = {a for d in program.typing.values[branch.exit][0] for a in atoms(d)}
    banks = [p for p in branch.parameters if len(dims[p]) == 3 and all(d.size > 1 for d in dims[p])]
    aside = stream | {a for p in banks for d in dims[p] for a in atoms(d)}
    own = {
        a for p in branch.parameters if p not in banks and p in program.trainable
        for d in dims[p] for a in atoms(d)
    }  # fmt: skip
    return not own.isdisjoint(set(queries) - aside)


def _structure(costs: CostModel, stack: Structure, role: str, branches: list[Block]) -> Structure:
    blocks = tuple(Block(i, b.entry, b.exit, b.nodes, b.parameters) for i, b in enumerate(branches))
    each = [costs.block(b) for b in blocks]
    members = dict.fromkeys((p, 0) for b in blocks for p in b.parameters)
    return Structure(
        name=f"{stack.name}/{role}",
        role=role,
        size=len(blocks),
        members=tuple(members),
        prunable=True,
        reason=None,
        params=round(sum(c.params for c in each) / len(each)),
        macs=round(sum(c.macs for c in each) / len(each)),
        blocks=blocks,
        parent=stack.name,
    )
