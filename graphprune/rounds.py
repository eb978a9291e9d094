"""Pruning in several rounds: what each round aims at, and how the next one sees the model.

The kept share falls geometrically, so that every round removes the same fraction of what is left
and scores are taken anew on what the round before left.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

from graphprune.errors import RecipeError
from graphprune.frontends.module import trace
from graphprune.passes.budget import RESOURCES
from graphprune.program import Program
from graphprune.recipe import Recipe
from graphprune.rewrite.slim import Slim


def interim_goal(
    recipe: Recipe, dense: Program, current: Program, number: int
) -> dict[str, dict[str, Any]]:
    """The goal of one round, as an argument of `graphprune.select`.

    Args:
        recipe: the whole goal and the number of rounds.
        dense: the program before the first round.
        current: the program that this round starts from.
        number: of the round, from 1.

    Raises:
        RecipeError: globs would name other layers than they did at the start.
    """
    if recipe.rounds > 1 and (recipe.exclude or recipe.include):
        _check_globs(dense, current)
    share = number / recipe.rounds
    if recipe.remove is not None:
        fractions = {
            role: max(0.0, 1 - (1 - removed) ** share / _left(role, removed, dense, current, recipe,
                                                             number))
            for role, removed in recipe.remove.items()
        }  # fmt: skip
        return {"remove": fractions}
    if recipe.target is not None:
        ((resource, budget),) = recipe.target.items()
        if recipe.rounds == 1:
            return {"target": {resource: budget}}
        whole = RESOURCES[resource](dense.costs.total())
        wanted = budget if isinstance(budget, int) else int(budget * whole)
        return {"target": {resource: int(whole * (wanted / whole) ** share)}}
    assert recipe.shape is not None
    if number == recipe.rounds:
        return {"shape": dict(recipe.shape)}
    sizes = {
        role: max(_sizes(dense, role), default=wanted) for role, wanted in recipe.shape.items()
    }
    shape = {
        role: round(sizes[role] * (wanted / sizes[role]) ** share)
        for role, wanted in recipe.shape.items()
    }
    return {"shape": shape}


def retrace(slim: Slim) -> Program:
    """The slim model as a program of its own."""
    args, kwargs = slim.program.example
    guard: Any = nullcontext()
    if slim.program.source is not None:
        from graphprune.frontends.hf import without_cache

        guard = without_cache(slim.module)
    with guard:
        return trace(slim.module.eval(), args, kwargs)


def _left(
    role: str, removed: float, dense: Program, current: Program, recipe: Recipe, number: int
) -> float:
    """The fraction of a role's units that earlier rounds left.

    Counted where that is possible, since they were rounded; `*` is several roles at once.
    """
    before = _sizes(dense, role)
    if role == "*" or not before:
        return float((1 - removed) ** ((number - 1) / recipe.rounds))
    return statistics.mean(_sizes(current, role)) / statistics.mean(before)


def _sizes(program: Program, role: str) -> list[int]:
    return [s.size for s in program.structures if s.prunable and s.role == _own(program, role)]


def _own(program: Program, role: str) -> str:
    if role != "heads":
        return role
    return "kv_heads" if any(s.role == "kv_heads" for s in program.structures) else "query_heads"


def _check_globs(dense: Program, current: Program) -> None:
    if any(s.blocks and s.size != dense.by_name[s.name].size for s in current.structures):
        raise RecipeError(
            "exclude and include don't go with rounds that remove layers",
            why="layers are renumbered after each round",
            hint="remove layers in a recipe of its own, or use one round",
        )
