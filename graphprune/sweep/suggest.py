"""Which point of a sweep to take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphprune.errors import ConditionError, EvaluationError
from graphprune.quality.conditions import Condition, check_conditions
from graphprune.quality.measures import Measures
from graphprune.sweep.result import Point, Suggestion


def suggest(
    points: Sequence[Point], before: Measures, conditions: Sequence[Condition] = ()
) -> Suggestion:
    """Choose a point.

    Under conditions it is the smallest model for which none holds. Without any it is the knee of
    the curve: where the logarithm of the perplexity ratio lies farthest below the straight line
    from the dense model to the smallest one, of the points that no other beats in both.

    Args:
        points: all of them.
        before: of the dense model.
        conditions: what a model must not have.
    """
    if conditions:
        return _within(points, before, conditions)
    costs = {one.label: _cost(one, before) for one in points}
    known = [one for one in points if costs[one.label] is not None]
    if not known:
        return Suggestion(
            None, "nothing is suggested: the quality of these models can't be measured here"
        )
    left = [(_kept(one, before), float(costs[one.label] or 0.0), one) for one in known]
    front = [
        item
        for item in left
        if not any((o[0] <= item[0] and o[1] < item[1]) or (o[0] < item[0] and o[1] <= item[1])
                   for o in left)
    ]  # fmt: skip
    front.sort(key=lambda item: -item[0])
    if len(front) < 2:
        return _taken(front[0][2], "it is the only one that no other beats in size and quality")
    *_, (end, most, _) = front

    def below(item: tuple[float, float, Point]) -> float:
        """How far below the line from the dense model to the smallest."""
        share = (1 - item[0]) / (1 - end) if end < 1 else 1.0
        return share * most - item[1]

    best = max(front, key=below)
    if below(best) <= 1e-12:
        first = front[0][2]
        return _taken(
            first, "quality falls from the first cut on, with no knee: it is the mildest cut"
        )
    return _taken(best[2], "it is the knee of the curve: beyond it each cut costs more than before")


def _within(
    points: Sequence[Point], before: Measures, conditions: Sequence[Condition]
) -> Suggestion:
    """The smallest model for which no condition holds."""
    told = ", ".join(one.text for one in conditions)
    good = []
    for one in points:
        try:
            check_conditions(conditions, before, one.after, one.quality)
        except (ConditionError, EvaluationError):
            continue
        good.append(one)
    if not good:
        return Suggestion(None, f"nothing is suggested: each point has {told}")
    best = min(good, key=lambda one: (_kept(one, before), _cost(one, before) or 0.0))
    return _taken(best, f"it is the smallest model without {told}")


def _taken(point: Point, why: str) -> Suggestion:
    return Suggestion(point.label, f"suggested: {point.label}; {why}", point.recipe)


def _kept(point: Point, before: Measures) -> float:
    """Share of the parameters that stay; masks leave all of them, so that zeros count as gone."""
    share = (point.after.parameters or 0) / (before.parameters or 1)
    return share * (1 - (point.zeros or 0.0))


def _cost(point: Point, before: Measures) -> float | None:
    """The logarithm of the perplexity ratio on the worst text, or the mean error of layers."""
    ratio = point.row(before)["perplexity_ratio"]
    if ratio is not None:
        return math.log(max(float(ratio), 1e-12))
    return point.error
