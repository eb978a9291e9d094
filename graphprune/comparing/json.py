"""Where two pieces of JSON data differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two pieces of JSON data differ: dotted key, value in either; None for none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            inner = f"{key}.{name}" if key else str(name)
            yield from differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield key, before, now


def numbers(data: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of JSON data that aren't in lists, by their dotted keys."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield key, data
