"""What config data may become once layers have left a stack.

A config counts the layers in a field, or by the length of a list that has an entry per layer, or
both. Beside them may be more such lists, tables by layer number, and lists of layer numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graphprune.rewrite.config.fields import Data, Path, edited, integers

_NUMBERS_LAYERS = re.compile(r"(^|_)(layers?|blocks?)(_|$)")
_NUMBERS_OUTPUTS = re.compile(r"(^|_)(features?|size|dims?|types?)(_|$)")


def shortened(data: Data, count: int, gone: Sequence[int]) -> Iterator[Data]:
    """Yield what the data may become, likeliest first.

    Args:
        data: of a config whose stack has `count` layers.
        count: how many there are.
        gone: the positions of those that leave.
    """
    places = list(_objects(data))
    fields = [path for path, value in integers(data) if value == count]
    for place in places:
        if _lists(_at(data, place), count):
            yield _without(data, place, None, count, gone)
    for renumber in (True, False):
        for path in fields:
            if isinstance(_at(data, path[:-1]), dict):
                yield _without(data, path[:-1], path[-1], count, gone, renumber=renumber)
    for path in fields:
        yield edited(data, {path: count - len(gone)})
    for place in places:
        for name in _lists(_at(data, place), count):
            yield _changed(data, place, lambda o, n=name: o.update({n: _left(o[n], gone)}))  # type: ignore[misc]


def without_layers(data: Data, field: Path, gone: Sequence[int]) -> Data:
    """Return a copy in which a count of layers is lower by those that are gone.

    What is listed or numbered by layer beside it goes along.
    """
    return _without(data, field[:-1], field[-1], _at(data, field), gone)


def _without(
    data: Data,
    place: Path,
    field: str | int | None,
    count: int,
    gone: Sequence[int],
    *,
    renumber: bool = True,
) -> Data:
    """A copy where an object has lost layers; `field` is the one that counts them, if one does."""

    def cut(owner: Any) -> None:
        if field is not None:
            owner[field] = count - len(gone)
        for name in _lists(owner, count) if isinstance(owner, dict) else ():
            owner[name] = _left(owner[name], gone)
        for name, value in owner.items() if renumber and isinstance(owner, dict) else ():
            if _is_table(value, count):
                owner[name] = _renumbered(value, gone)
            elif _is_numbers(str(name), value, count):
                owner[name] = [_number(i, gone) for i in value if i not in gone]

    return _changed(data, place, cut)


def _changed(data: Data, place: Path, change: Callable[[Any], None]) -> Data:
    result = copy.deepcopy(data)
    change(_at(result, place))
    return result


def _objects(data: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of the objects in the data."""
    if not isinstance(data, dict):
        return
    yield path
    for name, value in data.items():
        if isinstance(name, str) and not name.startswith("_"):
            yield from _objects(value, (*path, name))


def _lists(owner: Any, count: int) -> list[str]:
    """Names of the lists that have as many entries as there are layers."""
    return [n for n, v in owner.items() if isinstance(v, list | tuple) and len(v) == count]


def _is_table(value: Any, count: int) -> bool:
    """Whether it maps numbers of layers to what these have of their own."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(str(key).isdigit() and int(key) < count for key in value)
        and all(isinstance(entry, dict) for entry in value.values())
    )


def _is_numbers(name: str, value: Any, count: int) -> bool:
    """Whether it lists some of the layers, by number."""
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) < count
        and all(type(i) is int and 0 <= i < count for i in value)
        and len(set(value)) == len(value)
        and _NUMBERS_LAYERS.search(name) is not None
        and _NUMBERS_OUTPUTS.search(name) is None
    )


def _renumbered(table: dict[Any, Any], gone: Sequence[int]) -> dict[Any, Any]:
    return {
        type(key)(_number(int(key), gone)): value
        for key, value in table.items()
        if int(key) not in gone
    }


def _left(entries: Sequence[Any], gone: Sequence[int]) -> list[Any]:
    return [entry for i, entry in enumerate(entries) if i not in gone]


def _number(layer: int, gone: Sequence[int]) -> int:
    return layer - sum(other < layer for other in gone)


def _at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data
