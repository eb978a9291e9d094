"""What there is to say of numbers that a reader may not expect, and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphprune.quality.perplexity import Perplexity
from graphprune.quality.result import Comparison, Quality
from graphprune.recipe.recipe import Recipe
from graphprune.report.goals import last_goals
from graphprune.report.kept import kept_units
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx

WORSE = 1.5
"""Times the dense model's perplexity, above which a model should not be used as it is."""

SPREAD = 1.5
"""How far the ratios of two texts may be apart before one text says nothing of the other."""

DEEP = 0.5
"""Share of a role's units whose loss few models recover from without training."""

_NOTABLE = 0.2
"""Share of all parameters from which on a tensor that stays whole explains a deep cut."""


def quality_remarks(
    dense: Mapping[str, Perplexity],
    slim: Mapping[str, Perplexity],
    quality: Quality | None,
    *,
    trained: bool = False,
) -> tuple[str, ...]:
    """Return what to say of perplexities.

    Args:
        dense: of the dense model, by text.
        slim: of the slim model.
        quality: of both beside each other.
        trained: whether the slim model was trained.
    """
    texts = {} if quality is None else dict(quality.texts)
    if not texts:
        return ()
    by_ratio = sorted(texts, key=lambda text: texts[text].ratio.value)
    best, worst = by_ratio[0], by_ratio[-1]
    notes = []
    if texts[worst].ratio.value > WORSE:
        before, after = dense[worst].value, slim[worst].value
        notes.append(
            f"the perplexity on {worst} rose from {before:.4g} to {after:.4g}, "
            f"{_times(texts[worst])} the dense model's: remove less, or train the slim model "
            f"{'for longer ' if trained else ''}before it is used"
        )
    if texts[worst].ratio.value > SPREAD * texts[best].ratio.value:
        notes.append(
            f"what was removed costs much more on {worst} ({_times(texts[worst])} the dense "
            f"perplexity) than on {best} ({_times(texts[best])}): calibrate on text of every kind "
            "that the model is for, such as a mixture (calibration.data: {self: 0.5, FILE: 0.5})"
        )
    return tuple(notes)


def deep_cuts(recipe: Recipe, slim: Slim | SlimOnnx) -> tuple[str, ...]:
    """Return what to say of a budget that takes more than half of a role.

    Args:
        recipe: with the budget; other goals say themselves what goes of each role.
        slim: the slim model, or what it will be.
    """
    budgets = [s.target for s in last_goals(recipe) if s.target is not None]
    if not budgets:
        return ()
    ((resource, budget),) = budgets[-1].items()
    shares = {role: 1 - kept / size for role, (kept, size) in kept_units(slim).items() if size}
    deep = {role: share for role, share in shares.items() if share > DEEP}
    if not deep:
        return ()
    cuts = " and ".join(f"{100 * share:.0f} % of {role}" for role, share in deep.items())
    hint = "name more roles with remove or shape"
    total, left = (_resource(cost, resource) for cost in (slim.program.costs.total(), slim.cost))
    # What is left falls about evenly with what is cut.
    milder = math.ceil(100 * (1 - (1 - left / total) * DEEP / max(deep.values()))) / 100
    if left / total < milder < 1:
        hint = f"{resource}={milder:g} would take about half; or {hint}"
    return (f"{resource}={budget:g} takes {cuts}{_whole(slim)}: {hint}",)


def _whole(slim: Slim | SlimOnnx) -> str:
    """The largest tensor that stays as it is, if it is a large part of the model."""
    program = slim.program
    sizes = {name: math.prod(program.parameters[name]) for name in program.trainable}
    sizes = {name: size for name, size in sizes.items() if name not in program.aliases}
    kept = slim.plan.kept(program)
    whole = {name: size for name, size in sizes.items() if math.prod(map(len, kept[name])) == size}
    if not whole:
        return ""
    largest = max(whole, key=lambda name: whole[name])
    share = whole[largest] / sum(sizes.values())
    if share < _NOTABLE:
        return ""
    return f", since {largest}, {100 * share:.0f} % of the parameters, stays whole"


def _resource(cost: object, name: str) -> int:
    return int(getattr(cost, name))


def _times(found: Comparison) -> str:
    return f"{found.ratio.value:.3g} times"
