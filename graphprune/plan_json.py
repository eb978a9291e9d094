"""Plans as JSON: read so strictly that a file means one plan or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import PlanError
from graphprune.strict_json import parse_json, read_limited, shown

if TYPE_CHECKING:
    from graphprune.plan import Units

SCHEMA = 1

LARGEST = 1 << 28
"""Bytes of a plan; one for a hundred experts in each of a hundred layers has a tenth of it."""

_FIELDS = ("schema", "fingerprint", "structures")
_EXPECTED = 'a plan is {"schema": 1, "fingerprint": ..., "structures": {NAME: {"kept": [...]}}}'


@dataclass(frozen=True)
class Entries:
    """What a plan's file says.

    Attributes:
        fingerprint: of the program that the plan was made for.
        kept: structure name to its kept units.
        sizes: structure name to its number of units before pruning, where the file says so.
    """

    fingerprint: str
    kept: Mapping[str, Units]
    sizes: Mapping[str, int]


def read_plan(path: Path) -> bytes:
    """The bytes of a plan's file.

    Raises:
        PlanError: it is missing, can't be read, or is too large to be a plan.
    """
    try:
        return read_limited(path, LARGEST)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise PlanError("can't read the plan", where=str(path), why=why) from error


def parse_plan(raw: bytes | str, where: str) -> Entries:
    """What the JSON text of a plan says.

    Args:
        raw: it.
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
        kept, sizes = {}, {}
        for name, entry in data["structures"].items():
            kept[name], size = _entry(entry, f"structures, {shown(name)}")
            if size is not None:
                sizes[name] = size
    except ValueError as error:
        raise PlanError(
            "not a graphprune plan", where=where or None, why=str(error), hint=_hint(raw)
        ) from None
    return Entries(data["fingerprint"], kept, sizes)


def _check_schema(data: Mapping[str, Any], where: str) -> None:
    found = data.get("schema")
    if type(found) is int and found != SCHEMA:
        raise PlanError(
            f"plan schema {shown(found)} is not supported",
            where=where or None,
            hint=f"this version reads schema {SCHEMA}",
        )
    if "schema" in data and type(found) is not int:
        raise ValueError(f"'schema' is {shown(found)}, not a whole number")


def _check_keys(
    data: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...], place: str
) -> None:
    at = f"{place}: " if place else ""
    for key in data:
        if key not in known:
            raise ValueError(f"{at}unknown key {shown(key)}; a plan has {', '.join(known)}")
    for key in needed:
        if key not in data:
            raise ValueError(f"{at}'{key}' is missing")


def _entry(entry: Any, place: str) -> tuple[Units, int | None]:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: {_kind(entry)}, not an object")
    _check_keys(entry, ("size", "kept"), ("kept",), place)
    size = entry.get("size")
    if "size" in entry and (type(size) is not int or size < 1):
        raise ValueError(f"{place}: 'size' is {shown(size)}, not a number of units")
    kept = entry["kept"]
    if not isinstance(kept, list):
        raise ValueError(f"{place}: 'kept' is {_kind(kept)}, not a list")
    if not kept or not isinstance(kept[0], list):
        return _row(kept, size, place), size
    wrong = next((row for row in kept if not isinstance(row, list)), None)
    if wrong is not None:
        raise ValueError(f"{place}: 'kept' has lists, and {shown(wrong)} beside them")
    return tuple(_row(row, size, place) for row in kept), size


def _row(row: list[Any], size: int | None, place: str) -> tuple[int, ...]:
    for unit in row:
        if type(unit) is not int:  # True is an int to isinstance
            raise ValueError(f"{place}: {shown(unit)} is no unit; units are whole numbers from 0")
        if unit < 0 or (size is not None and unit >= size):
            below = "" if size is None else f" to {size - 1}"
            raise ValueError(f"{place}: unit {shown(unit)} isn't one of 0{below}")
    return tuple(row)


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
