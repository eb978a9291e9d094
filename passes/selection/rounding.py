"""What becomes of goals that no size meets exactly, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from graphprune.passes.selection.budget import RESOURCES, TOLERANCE, parse_target
from graphprune.passes.selection.levers import GlobalLever, Lever, UniformLever
from graphprune.passes.selection.scope import Scope
from graphprune.plan.plan import Plan

Pull: TypeAlias = tuple[str, Lever, float]
"""What is to shrink, in words, how it can, and by which fraction."""


def budget_notes(scope: Scope, target: Mapping[str, int | float], plan: Plan) -> tuple[str, ...]:
    """What to say where a plan stays clearly below its budget.

    Args:
        scope: what the plan could touch.
        target: the budget.
        plan: the plan.
    """
    program = scope.program
    resource, budget = parse_target(target, program.costs.total())
    selection = plan.bind(program)
    blocks = [b for cut in selection.cuts.values() for b in cut]
    reached = RESOURCES[resource](program.costs.of(selection.keep, blocks))
    dense = RESOURCES[resource](program.costs.total())
    if budget > dense:
        return (
            f"the budget of {budget:,} {resource} is more than the {dense:,} of the dense model: "
            "nothing is removed for it",
        )
    if reached >= budget * (1 - TOLERANCE):
        return ()
    return (
        f"the budget of {budget:,} {resource} is rounded down to {reached:,}, "
        f"{reached / dense:.1%} of the dense model: no sizes come nearer; a smaller align, ranking "
        "over all layers (uniform: false) or more roles may",
    )


def removal_notes(pulls: Sequence[Pull]) -> tuple[str, ...]:
    """What to say where sizes are rounded to others than fractions mean.

    Args:
        pulls: what is to shrink.
    """
    notes = []
    for what, lever, fraction in pulls:
        assert isinstance(lever, UniformLever | GlobalLever)
        counts = lever.at(lever.nearest(fraction))
        sizes = {c.structure.name: c.structure.size for c in lever.candidates}
        each = isinstance(lever, UniformLever)
        size = next(iter(sizes.values())) if each else sum(sizes.values())
        kept = next(iter(counts.values())) if each else sum(counts.values())
        asked = size - lever.wanted(fraction)
        if kept != asked:
            notes.append(
                f"{what}: {kept:,} of {size:,} stay instead of {asked:,}, the nearest that align "
                "and minimum leave"
            )
    return tuple(dict.fromkeys(notes))
