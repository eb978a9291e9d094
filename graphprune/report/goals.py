"""What became of a recipe's goal, for the report."""

from __future__ import annotations

from dataclasses import replace

from graphprune.analysis.program import BaseProgram
from graphprune.passes.selection.scope import Scope
from graphprune.passes.selection.select import goal_notes
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe


def rounding_notes(program: BaseProgram, recipe: Recipe, plan: Plan) -> tuple[str, ...]:
    """What to say where no size meets a recipe's goal exactly.

    Args:
        program: the dense program, with the recipe's names.
        recipe: the recipe.
        plan: what was made of it; it may be for the same model with biases.
    """
    if recipe.plan is not None or not recipe.removes:
        return ()
    align = 1 if recipe.shape is not None else recipe.align
    scope = Scope(program, recipe.exclude, recipe.include, recipe.minimum, align)
    goals = {"remove": recipe.remove, "target": recipe.target}
    own = replace(plan, fingerprint=program.fingerprint)
    return goal_notes(scope, goals, own, uniform=recipe.uniform)
