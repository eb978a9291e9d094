"""Plans as JSON: read so strictly that a file means one plan or none."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import PlanError
from graphprune.files.json import parse_json, read_limited, shown
from graphprune.plan.notes import Notes, ScoreSummary
from graphprune.plan.ranges import EXAMPLE, LARGEST, parse_ranges

if TYPE_CHECKING:
    from graphprune.plan.kept import Units

SCHEMA = 2

LARGEST_FILE = 1 << 28
"""Bytes of a plan; one for a hundred experts in each of a hundred layers has a tenth of it."""

_FIELDS = ("schema", "fingerprint", "structures")
_ENTRY = ("role", "size", "count", "kept", "parameters", "scores")
_EXPECTED = (
    'a plan is {"schema": 2, "fingerprint": ..., "structures": '
    '{NAME: {"size": 16, "count": 13, "kept": "0-11, 13"}}}'
)


@dataclass(frozen=True)
class Entries:
    """What a plan's file says.

    Attributes:
        fingerprint: of the program that the plan was made for.
        kept: structure name to its kept units.
        sizes: structure name to its number of units before pruning, where the file says so.
        notes: structure name to what else the file says of it.
    """

    fingerprint: str
    kept: Mapping[str, Units]
    sizes: Mapping[str, int]
    notes: Mapping[str, Notes]


def read_plan(path: Path) -> bytes:
    """The bytes of a plan's file.

    Raises:
        PlanError: it is missing, can't be read, or is too large to be a plan.
    """
    try:
        return read_limited(path, LARGEST_FILE)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise PlanError("can't read the plan", where=str(path), why=why) from error


def parse_plan(raw: bytes | str, where: str) -> Entries:
    """What the JSON text of a plan says.

    Args:
        raw: the text, or its bytes.
        where: where it is from, for errors.

    Raises:
        PlanError: it is no plan of a known schema. Nothing is turned into what was likely meant:
            no ``1.0`` or ``true`` into 1, and no key is passed over.
    """
    try:
        data = parse_json(raw)
        if not isinstance(data, dict):
            raise ValueError(f"it holds {_kind(data)}, not an object")
        _check_schema(data, where)
        _check_keys(data, _FIELDS, _FIELDS, "")
        if not isinstance(data["fingerprint"], str):
            raise ValueError(f"'fingerprint' is {shown(data['fingerprint'])}, not a string")
        if not isinstance(data["structures"], dict):
            raise ValueError(f"'structures' is {_kind(data['structures'])}, not an object")
        kept, sizes, notes = {}, {}, {}
        left = LARGEST
        for name, entry in data["structures"].items():
            place = f"structures, {shown(name)}"
            size = _size(entry, place)
            kept[name] = _kept(entry, size, left, place)
            left -= _units(kept[name])
            if size is not None:
                sizes[name] = size
            if (found := _notes(entry, place)) != Notes():
                notes[name] = found
    except ValueError as error:
        raise PlanError(
            "not a graphprune plan", where=where or None, why=str(error), hint=_hint(raw)
        ) from None
    return Entries(data["fingerprint"], kept, sizes, notes)


def _check_schema(data: Mapping[str, Any], where: str) -> None:
    found = data.get("schema")
    if type(found) is int and found != SCHEMA:
        raise PlanError(
            f"plan schema {shown(found)} is not supported",
            where=where or None,
            hint=f"this version reads schema {SCHEMA}, which lists kept units as ranges, "
            f"{EXAMPLE}: make the plan again",
        )
    if "schema" in data and type(found) is not int:
        raise ValueError(f"'schema' is {shown(found)}, not a whole number")


def _check_keys(
    data: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...], place: str
) -> None:
    at = f"{place}: " if place else ""
    for key in data:
        if key not in known:
            raise ValueError(f"{at}unknown key {shown(key)}; there may be {', '.join(known)}")
    for key in needed:
        if key not in data:
            raise ValueError(f"{at}'{key}' is missing")


def _size(entry: Any, place: str) -> int | None:
    """How many units there are, of an entry whose keys are as they should be."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: {_kind(entry)}, not an object")
    _check_keys(entry, _ENTRY, ("count", "kept"), place)
    size = entry.get("size")
    if "size" in entry and (type(size) is not int or size < 1):
        raise ValueError(f"{place}: 'size' is {shown(size)}, not a number of units")
    return size


def _kept(entry: Mapping[str, Any], size: int | None, most: int, place: str) -> Units:
    """The units that ranges and their count agree on."""
    kept, count = entry["kept"], entry["count"]
    if type(count) is not int or count < 0:  # True is an int to isinstance
        raise ValueError(f"{place}: 'count' is {shown(count)}, not a number of units")
    if isinstance(kept, str):
        return _row(kept, count, size, most, f"{place}: 'kept'")
    if not isinstance(kept, list):
        raise ValueError(f"{place}: 'kept' is {_kind(kept)}, not ranges such as {EXAMPLE}")
    wrong = next((row for row in kept if not isinstance(row, str)), None)
    if wrong is not None or not kept:
        found = f"{shown(wrong)} in it" if kept else "no ranges in it"
        raise ValueError(
            f"{place}: 'kept' has {found}; units are written as ranges, {EXAMPLE}, or as a list "
            "of such for each index of the axis around them"
        )
    rows = []
    for number, row in enumerate(kept):
        rows.append(_row(row, count, size, most, f"{place}: list {number} of 'kept'"))
        most -= len(rows[-1])
    return tuple(rows)


def _row(text: str, count: int, size: int | None, most: int, place: str) -> tuple[int, ...]:
    try:
        units = parse_ranges(text, size, most)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if len(units) != count:
        raise ValueError(f"{place} has {len(units)} units, and 'count' is {shown(count)}")
    return units


def _units(kept: Units) -> int:
    return sum(len(row) if isinstance(row, tuple) else 1 for row in kept)


def _notes(entry: Mapping[str, Any], place: str) -> Notes:
    role, parameters = entry.get("role", ""), entry.get("parameters", [])
    if not isinstance(role, str):
        raise ValueError(f"{place}: 'role' is {shown(role)}, not a string")
    if not isinstance(parameters, list) or not all(isinstance(one, str) for one in parameters):
        raise ValueError(f"{place}: 'parameters' is {shown(parameters)}, not a list of strings")
    if "scores" not in entry:
        return Notes(role, tuple(parameters))
    scores = entry["scores"]
    if not isinstance(scores, dict):
        raise ValueError(f"{place}: 'scores' is {_kind(scores)}, not an object")
    _check_keys(scores, tuple(ScoreSummary.__dataclass_fields__), (), f"{place}, scores")
    for key, value in scores.items():
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{place}: '{key}' is {shown(value)}, not a score")
    return Notes(role, tuple(parameters), ScoreSummary(**scores))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value",
             type(None): "null"}  # fmt: skip
    return names.get(type(value), "a number")


def _hint(raw: bytes | str) -> str:
    """What to do about a file that is no plan; the files beside plans are known by their look."""
    start = raw[: 1 << 12] if isinstance(raw, str) else raw[: 1 << 12].decode("utf-8", "replace")
    if '"source"' in start and '"fingerprint"' not in start:
        return "this looks like a report: give graphprune_plan.json, which lies beside it"
    if not start.lstrip().startswith(("{", "[")):
        return f"{_EXPECTED}; a recipe is given without --plan"
    return _EXPECTED
