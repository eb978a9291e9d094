"""Entries of a recipe that mean nothing beside others: they are refused, not passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphprune.recipe import Recipe

_CHOOSING = ("score", "aggregate", "normalize", "uniform", "minimum", "rounds")
"""How units are chosen."""


def check_together(recipe: Recipe) -> None:
    """See that every entry that isn't as by default has a part in what is asked for.

    Raises:
        ValueError: one hasn't.
    """
    given = {
        name: getattr(recipe, name)
        for name in recipe.model_fields_set
        if getattr(recipe, name) != type(recipe).model_fields[name].default
    }
    if not recipe.removes:
        names = ("include", "exclude", *_CHOOSING, "align", "names")
        repairs = ("repair",) if recipe.repair != "none" else ()
        name = _first(given, (*names, *repairs))
        if name is not None:
            under = "; put it under sparsify" if name in ("include", "exclude") else ""
            raise ValueError(f"'{name}' is about structures, and this recipe removes none{under}")
    if recipe.plan is not None:
        name = _first(given, (*_CHOOSING, "align", "include", "exclude"))
        if name is not None:
            raise ValueError(
                f"'{name}' says which units go, and that is settled by a saved plan; leave it out"
            )
    if recipe.shape is not None:
        name = _first(given, ("align", "uniform"))
        if name is not None:
            raise ValueError(f"'{name}' says nothing to a shape, which gives exact sizes")
    if recipe.rounds > 1 and recipe.score.name == "obs":
        raise ValueError(
            "score obs chooses in one round: it weighs every unit in the model as pruned so far; "
            "leave 'rounds' out"
        )


def _first(given: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in given), None)
