"""What other packages add by entry point: functions for operators of their own, by group."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from graphprune.errors import GraphPruneError

SIZES = "graphprune.sizes"
MASKED = "graphprune.masked"


@functools.cache
def plugins(group: str) -> Mapping[str, Any]:
    """The functions of a group by operator name, "mylib.scaled_add"; loaded on first use.

    Raises:
        GraphPruneError: one can't be imported, is for an operator of torch itself, or has a name
            that is taken.
    """
    found: dict[str, Any] = {}
    for point in entry_points(group=group):
        where = f"entry point {point.value!r} of {group}"
        if point.name in found or point.name.startswith("aten."):
            raise GraphPruneError(
                f"operator {point.name} has two functions in {group}",
                where=where,
                hint="remove one of the packages that register it, or rename the operator",
            )
        try:
            found[point.name] = point.load()
        except Exception as error:  # whatever importing somebody's package raises
            raise GraphPruneError(
                f"what {group} has for operator {point.name} can't be loaded",
                where=where,
                why=f"{type(error).__name__}: {error}",
                hint="mend or remove the package that registers it",
            ) from error
    return found
