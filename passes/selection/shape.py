"""Exact target shapes: the sizes that a configuration file would state."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.errors import PlanError
from graphprune.passes.selection.coupled import counted_once
from graphprune.passes.selection.levers import Counts
from graphprune.passes.selection.scope import UNALIGNED, Candidate, Scope
from graphprune.plan.selector import HEADS


def shape_counts(scope: Scope, shape: Mapping[str, int]) -> Counts:
    """Kept units of every structure for exact sizes.

    Args:
        scope: what may be touched, without alignment.
        shape: role to size. Layers, experts, kv_heads (heads) and query_heads, those of each
            key-value head, are counts; every other role is the size of its dimension.

    Raises:
        PlanError: a size is not reachable; the message states those that are.
    """
    if HEADS in shape and scope.role(HEADS) in shape:
        raise PlanError(f"'heads' and {scope.role(HEADS)!r} are the same role", where="shape",
                        hint="give one of them")  # fmt: skip
    counts: Counts = {}
    for role, size in shape.items():
        if isinstance(size, bool) or size != int(size) or size < 1:
            raise PlanError(f"{size!r} is not a size", where=f"shape {role}")
        for candidate in counted_once(scope.program, scope.candidates(role)):
            if role == HEADS and not candidate.ladder[-1] <= size <= candidate.structure.size:
                raise _no_such_heads(scope, candidate, int(size))
            counts[candidate.structure.name] = _units(scope, candidate, int(size))
    return counts


def _units(scope: Scope, candidate: Candidate, size: int) -> int:
    """The kept units that give a dimension of `size`."""
    structure = candidate.structure
    each = 1 if structure.role in UNALIGNED else scope.width(structure)
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


def _no_such_heads(scope: Scope, candidate: Candidate, wanted: int) -> PlanError:
    """What to say to a number of heads that can't be, which is often meant of query heads."""
    structure, least = candidate.structure, int(candidate.ladder[-1])
    inside = (s.size for s in scope.by_role.get("query_heads", ()) if s.scope == structure.scope)
    queries = next(inside, 1) if structure.role == "kv_heads" else 1
    if queries == 1:
        return _unreachable(f"heads {wanted}", structure.name, f"{least} to {structure.size}")
    units, rest = divmod(wanted, queries)
    fits = not rest and least <= units <= structure.size
    return PlanError(
        f"the shape heads {wanted} is not reachable",
        where=structure.name,
        why=f"a unit of heads is a key-value head with its {queries} query heads, of which "
        f"{least} to {structure.size} can stay",
        hint=f"for {wanted} query heads ask for heads={units}"
        if fits
        else "ask for one of these numbers; query_heads says how many stay of each",
    )


def _unreachable(what: str, where: str, reachable: str) -> PlanError:
    return PlanError(
        f"the shape {what} is not reachable",
        where=where,
        why=f"the reachable values are {reachable}",
        hint="ask for one of them",
    )
