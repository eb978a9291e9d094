"""Structures: atoms with all that they touch, found as components of a dependency graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import networkx as nx

from graphprune.analysis.cost import CostModel
from graphprune.analysis.facts import GraphFacts
from graphprune.analysis.roles import assign_roles
from graphprune.analysis.structure import Block, Structure
from graphprune.axes import (
    Atom,
    Dims,
    Expr,
    Product,
    Sum,
    atoms,
    enclosed,
    evaluate,
    normal,
    path_to,
)
from graphprune.ops import Typing


def dependency_graph(typing: Typing, aliases: Mapping[str, str]) -> nx.Graph[Any]:
    """Atoms on one side, (parameter, dimension) pairs on the other; tied parameters once."""
    graph: nx.Graph[Any] = nx.Graph()
    for name, dims in typing.parameters.items():
        if aliases.get(name, name) != name:
            continue
        for dim, e in enumerate(dims):
            for atom in dict.fromkeys(atoms(e)):
                graph.add_edge(atom, (name, dim))
    return graph


def find_structures(program: GraphFacts, costs: CostModel) -> tuple[Structure, ...]:
    """All structures of `program`, prunable and frozen ones, then its stacks of layers."""
    typing = program.typing
    graph = dependency_graph(typing, program.aliases)
    order = {name: i for i, name in enumerate(typing.parameters)}
    members = {
        node: tuple(sorted(graph[node], key=lambda pair: (order[pair[0]], pair[1])))
        for node in graph
        if isinstance(node, Atom)
    }
    members = {
        a: pairs for a, pairs in members.items() if any(p in program.trainable for p, _ in pairs)
    }
    stacks = program.stacks()
    stream = _stream(stacks, typing, program.residual_sums())
    roles = assign_roles(members, program.ranks, stream, typing)
    outer = _ragged(typing, program.aliases, members)
    least = _minima(typing)
    found = [
        _structure(atom, pairs, roles[atom], outer.get(atom), least.get(atom, 1), program, costs)
        for atom, pairs in members.items()
    ]
    found.sort(key=lambda s: (order[s.members[0][0]], s.members[0][1], s.name))
    return (*found, *(_stack(path, n, blocks, costs) for path, (n, blocks) in stacks.items()))


def _minima(typing: Typing) -> dict[Atom, int]:
    """Units that every atom has to keep, so that any plan that respects them leaves enough."""
    least: dict[Atom, int] = {}

    def size_of(atom: Atom) -> int:
        return atom.size if atom.frozen else least.get(atom, 1)

    def enough(e: Expr, needed: int) -> bool:
        try:
            return evaluate(e, size_of) >= needed
        except ValueError:  # the size of a re-indexed axis depends on which units go
            return False

    # An axis of one atom leaves no choice, so it comes first; then the inner atoms give way.
    for e, needed, _ in sorted(typing.minima, key=lambda m: len(set(atoms(m.axis)))):
        for atom in reversed(list(dict.fromkeys(atoms(e)))):
            while not atom.frozen and size_of(atom) < atom.size and not enough(e, needed):
                least[atom] = size_of(atom) + 1
    return least


def frozen_dimensions(typing: Typing) -> dict[tuple[str, int], str]:
    """Parameter dimensions without a prunable atom, and why."""
    result = {}
    for name, dims in typing.parameters.items():
        for dim, e in enumerate(dims):
            found = list(atoms(e))
            if all(a.frozen for a in found):
                reasons = dict.fromkeys(str(a.reason) for a in found)
                result[name, dim] = "; ".join(reasons) or "an axis of size 1"
    return result


def scope_of(parameter: str) -> str:
    """The path of `parameter` up to its first number, "model.layers.0"; "" without one."""
    parts = parameter.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def _structure(
    atom: Atom,
    pairs: tuple[tuple[str, int], ...],
    role: str,
    within: Atom | None,
    minimum: int,
    program: GraphFacts,
    costs: CostModel,
) -> Structure:
    typing, trainable = program.typing, program.trainable
    unit = costs.unit(atom)
    scopes = {scope_of(p) for p, _ in pairs}
    return Structure(
        name=_name(atom, pairs, typing, trainable),
        role="" if atom.frozen else role,
        size=atom.size,
        members=pairs,
        prunable=not atom.frozen,
        reason=str(atom.reason) if atom.frozen else None,
        params=unit.params,
        macs=unit.macs,
        scope=scopes.pop() if len(scopes) == 1 else "",
        atom=atom,
        within=within,
        minimum=minimum,
    )


def _name(
    atom: Atom,
    pairs: tuple[tuple[str, int], ...],
    typing: Typing,
    trainable: frozenset[str],
) -> str:
    """The shortest place among the members, the first of equals; parameters before buffers."""
    places = []
    for parameter, dim in [p for p in pairs if p[0] in trainable] or pairs:
        path = path_to(typing.parameters[parameter][dim], atom)
        if path is not None:
            places.append((len(path), parameter, dim, path))
    _, parameter, dim, path = min(places, key=lambda place: place[0])
    return f"{parameter}:{'/'.join(map(str, (dim, *path)))}"


def _stack(path: str, size: int, blocks: list[Block], costs: CostModel) -> Structure:
    each = [costs.block(b) for b in blocks]
    members = dict.fromkeys((p, 0) for b in blocks for p in b.parameters)
    return Structure(
        name=path,
        role="layers",
        size=size,
        members=tuple(members),
        prunable=True,
        reason=None,
        params=round(sum(c.params for c in each) / len(each)),
        macs=round(sum(c.macs for c in each) / len(each)),
        blocks=tuple(blocks),
    )


def _stream(
    stacks: Mapping[str, tuple[int, list[Block]]], typing: Typing, sums: Sequence[str]
) -> set[Atom]:
    """The atoms of what runs along residual paths."""
    values = [*(b.exit for _, blocks in stacks.values() for b in blocks), *sums]
    return {a for v in values for dims in typing.values[v] for d in dims for a in atoms(d)}


def _ragged(
    typing: Typing, aliases: Mapping[str, str], members: Mapping[Atom, object]
) -> dict[Atom, Atom]:
    """For each ragged atom the atom around it.

    An atom is ragged within another when every tensor that carries it also carries the other,
    further out, and every parameter and constant does so in the same dimension. A tensor that holds
    either of them twice (scores between all pairs of places) can't tell which belongs to which, nor
    can a product that sums over one of two.
    """
    around: dict[Atom, set[Atom]] = {}

    def note(dims: Dims) -> None:
        times = _multiplicity(Product(dims))
        for atom, outer in enclosed(dims):
            if atom in members and not atom.frozen:
                clear = {o for o in outer if times[o] == times[atom] == 1}
                around[atom] = around.get(atom, clear) & clear

    seen: set[tuple[int, ...]] = set()
    made = [typing.values[name][0] for name in typing.constants if name in typing.values]
    own = [dims for name, dims in typing.parameters.items() if aliases.get(name, name) == name]
    for d in chain.from_iterable((*own, *made)):
        note((d,))
    for value in typing.values.values():
        for dims in value:
            key = tuple(map(id, dims))
            if key not in seen:
                seen.add(key)
                note(dims)
    for _, loop in typing.contractions:
        times = _multiplicity(Product(loop))
        twice = {a for a in times if times[a] > 1}
        for atom in around.keys() & times.keys() if twice else ():
            around[atom] = set() if atom in twice else around[atom] - twice
    order = {atom: i for i, atom in enumerate(members)}
    return {
        atom: min(outer & members.keys(), key=lambda a: order[a])
        for atom, outer in around.items()
        if outer & members.keys()
    }


def _multiplicity(e: Expr) -> Counter[Atom]:
    """How often one position of `e` depends on each atom."""
    match normal(e):
        case Atom() as a:
            return Counter({a: 1})
        case Product(factors=factors):
            return sum(map(_multiplicity, factors), Counter())
        case Sum(terms=terms):
            most: Counter[Atom] = Counter()
            for term in terms:
                most |= _multiplicity(term)
            return most
        case other:
            return Counter(atoms(other))
