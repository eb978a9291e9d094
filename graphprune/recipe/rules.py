"""Entries of a recipe that mean nothing beside others: they are refused, not passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

_CHOOSING = ("score", "aggregate", "normalize", "uniform", "minimum", "rounds")
"""How units are chosen."""


def check_together(given: Mapping[str, object], *, removes: bool, score: str) -> None:
    """See that every entry that isn't as by default has a part in what is asked for.

    Args:
        given: entries that aren't as by default, by name.
        removes: whether structures are removed.
        score: the name of what units are ranked by.

    Raises:
        ValueError: one hasn't.
    """
    if not removes:
        names = ("include", "exclude", *_CHOOSING, "align", "names")
        repaired = getattr(given.get("repair"), "name", "none") != "none"
        repairs = ("repair",) if repaired else ()
        name = _first(given, (*names, *repairs))
        if name is not None:
            under = "; put it under sparsify" if name in ("include", "exclude") else ""
            raise ValueError(f"'{name}' is about structures, and this recipe removes none{under}")
    if "plan" in given:
        name = _first(given, (*_CHOOSING, "align", "include", "exclude"))
        if name is not None:
            raise ValueError(
                f"'{name}' says which units go, and that is settled by a saved plan; leave it out"
            )
    check_shape(given)
    if "rounds" in given and score == "obs":
        raise ValueError(
            "score obs chooses in one round: it weighs every unit in the model as pruned so far; "
            "leave 'rounds' out"
        )


def check_alone(given: Mapping[str, object]) -> None:
    """See that nothing stands beside ``steps`` that a step says.

    Args:
        given: entries that aren't as by default, by name.

    Raises:
        ValueError: something does.
    """
    goals = ("remove", "target", "shape", "plan", "sparsify", "repair", "match", "recover")
    name = _first(given, (*goals, "include", "exclude", *_CHOOSING, "align"))
    if name is not None:
        raise ValueError(f"'{name}' stands beside steps; put it into the step that it is for")
    if "effort" in given:
        raise ValueError("effort chooses what is done, and steps say it: leave one of them out")


def check_shape(given: Mapping[str, object]) -> None:
    """See that nothing stands beside a shape that says nothing to exact sizes.

    Args:
        given: entries that aren't as by default, by name.

    Raises:
        ValueError: something does.
    """
    name = _first(given, ("align", "uniform")) if "shape" in given else None
    if name is not None:
        raise ValueError(f"'{name}' says nothing to a shape, which gives exact sizes")


def changed(section: BaseModel) -> dict[str, Any]:
    """The entries of a section that were given and aren't as by default, by name."""
    fields = type(section).model_fields
    given = {name: getattr(section, name) for name in section.model_fields_set if name in fields}
    return {name: value for name, value in given.items() if value != fields[name].default}


def _first(given: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in given), None)
