"""Plans as files have them, read without our own reader."""

from __future__ import annotations

from typing import Any


def units(kept: str | list[str]) -> list[Any]:
    """What ``"0-2, 5"`` lists: [0, 1, 2, 5]; of a list of such, one list for each."""
    if isinstance(kept, list):
        return [units(row) for row in kept]
    found: list[int] = []
    for part in kept.split(", ") if kept else ():
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
