"""Kept units as a plan has them."""

from __future__ import annotations

from typing import TypeAlias, cast

Units: TypeAlias = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Kept units; of a ragged structure one list per index of the axis around it."""


def is_ragged(units: Units) -> bool:
    """Whether `units` has one list per index of an outer axis."""
    return bool(units) and isinstance(units[0], tuple)


def rows_of(units: Units) -> tuple[tuple[int, ...], ...]:
    """The lists of a ragged structure, or the one list of another."""
    return cast("tuple[tuple[int, ...], ...]", units if is_ragged(units) else (units,))
