"""Structures of one role that multiply: groups and the channels of each.

A dimension of ``groups * channels`` has two structures, both of them channels. Halving each would
leave a quarter, so that a role's fraction or size is that of one of them, the one with the finest
steps; the other stays whole.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes import Atom, Expr, Product, Select, Sum, atoms, normal
from graphprune.passes.selection.scope import Candidate

T = TypeVar("T")


def counted_once(program: BaseProgram, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates of one role that multiply, those with the finest steps; all others."""
    return _apart(program, candidates, lambda c: c.structure, lambda c: len(c.ladder))


def units_of(
    program: BaseProgram, structures: Sequence[Structure], *sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """How many units people count in structures.

    Args:
        program: the program.
        structures: some of them.
        sizes: structure name to its number of units, of one model or of several.

    Returns:
        Structure name to that number in each; units that multiply count as their product, once.
    """
    partners = _partners(program, structures)
    counted = _apart(program, structures, lambda s: s, lambda s: s.size)
    return {
        s.name: tuple(n[s.name] * math.prod(n[p] for p in partners[s.name]) for n in sizes)
        for s in counted
    }


def _apart(
    program: BaseProgram,
    items: Sequence[T],
    structure: Callable[[T], Structure],
    fineness: Callable[[T], int],
) -> list[T]:
    """Items of which no two multiply, in the order given.

    The finest come first. Where that leaves a dimension without any, because all of its own
    multiply with others elsewhere, its finest is preferred to those.
    """
    partners = _partners(program, [structure(item) for item in items])
    if not partners:
        return list(items)
    order = sorted(items, key=lambda item: -fineness(item))
    dims: dict[tuple[str, int], list[str]] = defaultdict(list)
    for item in order:
        for member in structure(item).members:
            dims[member].append(structure(item).name)
    first: set[str] = set()
    while True:
        taken: set[str] = set()
        for item in sorted(order, key=lambda item: structure(item).name not in first):
            name = structure(item).name
            if taken.isdisjoint(partners[name]):
                taken.add(name)
        bare = {names[0] for names in dims.values() if taken.isdisjoint(names)}
        if bare <= first:
            return [item for item in items if structure(item).name in taken]
        first |= bare


def _partners(program: BaseProgram, structures: Sequence[Structure]) -> dict[str, set[str]]:
    """Structure name to the names of the others of its role that multiply with it."""
    known = {s.atom: s for s in structures if s.atom is not None}
    dims = dict.fromkeys(member for s in structures if s.atom is not None for member in s.members)
    found: dict[str, set[str]] = defaultdict(set)
    for parameter, dim in dims:
        for a, b in _factors(program.axis(parameter, dim)):
            one, other = known.get(a), known.get(b)
            if one and other and one is not other and one.role == other.role:
                found[one.name].add(other.name)
                found[other.name].add(one.name)
    return found


def _factors(e: Expr) -> Iterator[tuple[Atom, Atom]]:
    """All pairs of atoms that an expression multiplies."""
    match normal(e):
        case Product(factors=parts):
            for one, other in itertools.combinations(parts, 2):
                yield from itertools.product(atoms(one), atoms(other))
        case Sum(terms=parts):
            pass
        case Select(base=base):
            parts = (base,)
        case _:
            parts = ()
    for part in parts:
        yield from _factors(part)
