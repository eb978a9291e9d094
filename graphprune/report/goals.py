"""What became of a recipe's goal, for the report."""

from __future__ import annotations

from dataclasses import replace

from graphprune.analysis.program import BaseProgram
from graphprune.passes.selection.scope import Scope
from graphprune.passes.selection.select import goal_notes
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.selection import Selection


def rounding_notes(program: BaseProgram, recipe: Recipe, plan: Plan) -> tuple[str, ...]:
    """What to say where no size meets a recipe's goal exactly.

    Args:
        program: the dense program, with the recipe's names.
        recipe: the recipe.
        plan: what was made of it; it may be for the same model with biases.
    """
    own = replace(plan, fingerprint=program.fingerprint)
    notes: list[str] = []
    for wanted in last_goals(recipe):
        align = 1 if wanted.shape is not None else wanted.align
        scope = Scope(program, wanted.exclude, wanted.include, wanted.minimum, align)
        goals = {"remove": wanted.remove, "target": wanted.target}
        notes += goal_notes(scope, goals, own, uniform=wanted.uniform)
    return tuple(dict.fromkeys(notes))


def last_goals(recipe: Recipe) -> tuple[Selection, ...]:
    """The selections whose goals a model has to meet in the end: those of the last rounds."""
    return tuple(
        one.options
        for one in recipe.passes
        if isinstance(one.options, Selection) and one.round.number == one.round.of
    )
