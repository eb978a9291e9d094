"""Config fields as plain data: every integer in a nested config has a path to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
Data = dict[str, Any]


def integers(data: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield the path and value of every integer, in sub-configs and lists too."""
    if type(data) is int:
        yield path, data
    for key, value in _items(data):
        yield from integers(value, (*path, key))


def unset(data: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every field that is None."""
    if data is None:
        yield path
    for key, value in _items(data):
        yield from unset(value, (*path, key))


def _items(data: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(data, dict):
        # Private fields and the keys of label maps (integers) are no sizes.
        for key, value in data.items():
            if isinstance(key, str) and not key.startswith("_"):
                yield key, value
    elif isinstance(data, (list, tuple)):
        yield from enumerate(data)


def edited(data: Data, edits: Mapping[Path, Any]) -> Data:
    """Return a copy with some values replaced or added."""
    result = copy.deepcopy(data)
    for path, value in edits.items():
        target: Any = result
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
    return result


def changes(old: Data, new: Data, owner: Any, prefix: str = "") -> dict[str, Any]:
    """Return what differs as dotted fields with their new values; lists count as one value.

    Args:
        old: the data of a config.
        new: other data.
        owner: the config. What it shows in another form than its data (a view of its layers) counts
            as one value too, since nobody could set a part of it.
        prefix: of the fields.
    """
    result: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            part = owner.get(key) if isinstance(owner, dict) else getattr(owner, key, None)
            if value.keys() >= before.keys() and (
                isinstance(part, dict) or hasattr(part, "to_dict")
            ):
                result |= changes(before, value, part, f"{prefix}{key}.")
                continue
        if key not in old or value != before:
            result[f"{prefix}{key}"] = value
    return result


def dotted(path: Path) -> str:
    """Return a path as people write it: "text_config.hidden_sizes[2]"."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.removeprefix(".")
