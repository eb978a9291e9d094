"""Exact target shapes: the sizes that a configuration file would state."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from graphprune.axes import Atom, atoms
from graphprune.errors import PlanError
from graphprune.passes.coupled import counted_once
from graphprune.passes.levers import Counts
from graphprune.passes.scope import COUNTED, HEADS, Candidate, Scope
from graphprune.program import BaseProgram, Structure

UNITS = COUNTED | {"kv_heads", "query_heads"}  # stated as numbers of units, not as positions


def shape_counts(scope: Scope, shape: Mapping[str, int]) -> Counts:
    """Kept units of every structure for exact sizes.

    Args:
        scope: what may be touched, without alignment.
        shape: role to size. Layers, experts, kv_heads and query_heads are counts; ``heads`` is
            the number of query heads; every other role is the size of its dimension.

    Raises:
        PlanError: a size is not reachable; the message states those that are.
    """
    if HEADS in shape and {"kv_heads", "query_heads"} & shape.keys():
        raise PlanError("'heads' says how many query heads there are", where="shape",
                        hint="give either heads, or kv_heads and query_heads")  # fmt: skip
    counts: Counts = {}
    for role, size in shape.items():
        if isinstance(size, bool) or size != int(size) or size < 1:
            raise PlanError(f"{size!r} is not a size", where=f"shape {role}")
        if role == HEADS and scope.role(HEADS) == "kv_heads":
            counts |= _heads(scope, int(size))
        else:
            for candidate in counted_once(scope.program, scope.candidates(role)):
                counts[candidate.structure.name] = _units(scope, candidate, int(size))
    return counts


def _units(scope: Scope, candidate: Candidate, size: int) -> int:
    """The kept units that give a dimension of `size`."""
    structure = candidate.structure
    each = 1 if structure.role in UNITS else scope.width(structure)
    units, rest = divmod(size, each)
    least = int(candidate.ladder[-1])
    if rest or not least <= units <= structure.size:
        raise _unreachable(
            f"{structure.role} {size}",
            structure.name,
            f"{least * each} to {structure.size * each}"
            + (f" in steps of {each}" if each > 1 else ""),
        )
    return units


def _heads(scope: Scope, heads: int) -> Counts:
    """Whole groups where that is possible, else as many key-value heads as can be, thinner."""
    counts: Counts = {}
    hinted = _head_atoms(scope.program)
    has_queries = "query_heads" in scope.prunable_roles()
    by_atom = {c.structure.atom: c for c in scope.candidates("query_heads")} if has_queries else {}
    for candidate in scope.candidates("kv_heads"):
        structure = candidate.structure
        inner = _query_atoms(scope.program, structure, hinted)
        per_group = math.prod(a.size for a in inner)
        queries = by_atom.get(inner[0]) if len(inner) == 1 else None
        kept_queries = queries.ladder.tolist() if queries is not None else [per_group]
        groups = range(structure.size, int(candidate.ladder[-1]) - 1, -1)
        grid = {kv * per_group: (kv, per_group) for kv in groups}
        for kv in groups:
            for q in kept_queries:
                grid.setdefault(kv * q, (kv, q))
        if heads not in grid:
            raise _unreachable(f"heads {heads}", structure.name, ", ".join(map(str, sorted(grid))))
        counts[structure.name], kept = grid[heads]
        if queries is not None:
            counts[queries.structure.name] = kept
    return counts


def _head_atoms(program: BaseProgram) -> set[Atom]:
    """Atoms over which attention products are batched, whatever else is."""
    return {a for e, role in program.typing.hints if role == "heads" for a in atoms(e)}


def _query_atoms(program: BaseProgram, structure: Structure, heads: Collection[Atom]) -> list[Atom]:
    """The atoms that number the query heads of one key-value head."""
    found: list[Atom] = []
    for parameter, dim in structure.members:
        inside = dict.fromkeys(atoms(program.axis(parameter, dim)))
        queries = [a for a in inside if a in heads and a is not structure.atom]
        found = max(found, queries, key=len)
    return found


def _unreachable(what: str, where: str, reachable: str) -> PlanError:
    return PlanError(
        f"the shape {what} is not reachable",
        where=where,
        why=f"the reachable values are {reachable}",
        hint="ask for one of them",
    )
