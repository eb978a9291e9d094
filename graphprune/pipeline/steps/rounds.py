"""Pruning in several rounds: what each round aims at, and how the next one sees the model.

The kept share falls geometrically, so that every round removes the same fraction of what is left
and scores are taken anew on what the round before left.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.analysis.sublayers import SUBLAYERS
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError, RecipeError
from graphprune.passes.selection.budget import RESOURCES
from graphprune.passes.selection.coupled import units_of
from graphprune.passes.turn import Round
from graphprune.plan.kept import Units, rows_of
from graphprune.plan.plan import Plan
from graphprune.plan.selector import Selector, own_name
from graphprune.plan.units import pair_sums, unit_sums
from graphprune.recipe.selection import Selection
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


def interim_goal(
    wanted: Selection, turn: Round, dense: BaseProgram, current: BaseProgram
) -> dict[str, dict[str, Any]]:
    """The goal of one round, as an argument of `graphprune.select`.

    Args:
        wanted: the goal, which is of the dense program.
        turn: the round.
        dense: the program before anything went.
        current: the program that this round starts from.

    Raises:
        RecipeError: globs would name other layers than they did at the start.
    """
    first = current.fingerprint == dense.fingerprint
    if not (first and turn.of == 1) and (wanted.exclude or wanted.include or wanted.names or any(
        not _is_role(key) for key in wanted.remove or ())):  # fmt: skip
        _check_globs(dense, current)
    if wanted.remove is not None:
        fractions = {
            role: max(0.0, 1 - (1 - removed) ** turn.share / _left(role, removed, dense, current,
                                                                   turn))
            for role, removed in wanted.remove.items()
        }  # fmt: skip
        return {"remove": fractions}
    if wanted.target is not None:
        ((resource, budget),) = wanted.target.items()
        if first and turn.of == 1:
            return {"target": {resource: budget}}
        whole = RESOURCES[resource](dense.costs.total())
        final = budget if isinstance(budget, int) else int(budget * whole)
        return {"target": {resource: int(whole * (final / whole) ** turn.share)}}
    assert wanted.shape is not None
    if turn.share == 1:
        return {"shape": dict(wanted.shape)}
    sizes = {role: max(_sizes(dense, role), default=size) for role, size in wanted.shape.items()}
    shape = {
        role: round(sizes[role] * (size / sizes[role]) ** turn.share)
        for role, size in wanted.shape.items()
    }
    return {"shape": shape}


def composed(slim: Slim | SlimOnnx, current: BaseProgram, later: Plan) -> Plan:
    """The plan of `slim`, then `later`; made for the program of the former.

    Structures of the slim model may lie elsewhere in their dimensions (a single head is no factor
    any more) or be others altogether, so that names say little. What the two plans leave of every
    parameter is what counts.

    Args:
        slim: what the first plan made.
        current: it as a program of its own.
        later: a plan for `current`.

    Raises:
        PlanError: no plan for the first program leaves the same indices.
    """
    program = slim.program
    first, then = slim.plan.kept(program), later.kept(current)
    kept = {
        name: tuple(a[b] for a, b in zip(dims, then[slim.renamed[name]], strict=True))
        if slim.renamed.get(name) in then
        else tuple(a[:0] for a in dims)
        for name, dims in first.items()
    }
    units = {}
    for s in program.structures:
        found = _layers_left(slim, later, s) if s.blocks else _units_left(program, s, kept)
        if found is not None and any(len(row) < s.size for row in rows_of(found)):
            units[s.name] = found
    for s in program.sublayers:
        left = tuple(
            b.index for b in s.blocks if any(len(a) for p in b.parameters for a in kept[p])
        )
        if len(left) < s.size:
            units[s.name] = left
    plan = Plan(program.fingerprint, units, {n: program.by_name[n].size for n in units})
    for name, dims in plan.kept(program).items():
        if any(not np.array_equal(a, b) for a, b in zip(dims, kept[name], strict=True)):
            raise PlanError(
                "the later plan can't be told in units of the original model",
                where=name,
                why="it cuts what only belongs apart since the first plan",
                hint="prune in one round, or write the model out in between",
            )
    return plan.noted(program)


def _layers_left(slim: Slim | SlimOnnx, later: Plan, stack: Structure) -> Units | None:
    (units,) = rows_of(slim.plan.kept_units.get(stack.name, tuple(range(stack.size))))
    (chosen,) = rows_of(later.kept_units.get(stack.name, tuple(range(len(units)))))
    return tuple(units[i] for i in chosen)


def _units_left(
    program: BaseProgram, structure: Structure, kept: Mapping[str, tuple[IntArray, ...]]
) -> Units | None:
    """The units of which anything is left; None where all of its parameters have gone."""
    atom, outer = structure.atom, structure.within
    assert atom is not None
    left = np.zeros((outer.size if outer else 1, atom.size))
    for parameter, dim in structure.members:
        e = program.typing.parameters[parameter][dim]
        mask = np.zeros(e.size)
        mask[kept[parameter][dim]] = 1
        left += pair_sums(mask, e, outer, atom) if outer else unit_sums(mask, e, atom)
    rows = [tuple(int(i) for i in np.flatnonzero(row)) for row in left if row.any()]
    if not rows:
        return None
    if len(set(rows)) == 1:
        return rows[0]
    # What a removed outer index keeps means nothing.
    found = iter(rows)
    return tuple(next(found) if row.any() else rows[0] for row in left)


def _left(
    role: str, removed: float, dense: BaseProgram, current: BaseProgram, turn: Round
) -> float:
    """The fraction of a role's units that earlier rounds left.

    Counted where that is possible, since they were rounded; `*` is several roles at once.
    """
    before = _sizes(dense, role)
    if role == "*" or not before:
        return 1.0 if turn.given else float((1 - removed) ** ((turn.number - 1) / turn.of))
    return statistics.mean(_sizes(current, role)) / statistics.mean(before)


def _is_role(key: str) -> bool:
    return key == "*" or key.isidentifier()


def _sizes(program: BaseProgram, role: str) -> list[int]:
    if not _is_role(role):
        chosen = Selector.parse(role).bind(program)
        found = [s for s in program.structures if s.prunable and chosen.touches(s)]
        found = [s for s in found if not s.blocks]
    else:
        known = program.sublayers if role in SUBLAYERS else program.structures
        found = [s for s in known if s.prunable and s.role == _own(program, role)]
    return [n for (n,) in units_of(program, found, {s.name: s.size for s in found}).values()]


def _own(program: BaseProgram, role: str) -> str:
    return own_name(role, {s.role for s in program.structures})


def _check_globs(dense: BaseProgram, current: BaseProgram) -> None:
    if any(s.blocks and s.size != dense.by_name[s.name].size for s in current.structures):
        raise RecipeError(
            "globs of parameters don't go with rounds that remove layers",
            why="layers are renumbered after each round",
            hint="remove layers in a recipe of its own, or use one round",
        )
