"""Plans as JSON text that people can read: a few lines for each structure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from graphprune.errors import PlanError
from graphprune.plan.json import SCHEMA, Entries
from graphprune.plan.kept import Units
from graphprune.plan.notes import Notes
from graphprune.plan.ranges import ranges_text


def plan_text(plan: Entries) -> str:
    """A plan as `graphprune.plan.json.parse_plan` reads it; the same text for the same plan.

    Raises:
        PlanError: it keeps another number of units in every outer unit, which no model can have.
    """
    entries = [
        f"  {json.dumps(name)}: {{\n{_lines(plan, name, units)}\n  }}"
        for name, units in plan.kept.items()
    ]
    inside = "{\n" + ",\n".join(entries) + "\n }" if entries else "{}"
    head = f'{{\n "schema": {SCHEMA},\n "fingerprint": {json.dumps(plan.fingerprint)},\n'
    return f'{head} "structures": {inside}\n}}'


def _lines(plan: Entries, name: str, units: Units) -> str:
    return ",\n".join(f"   {json.dumps(key)}: {text}" for key, text in _entries(plan, name, units))


def _entries(plan: Entries, name: str, units: Units) -> Iterator[tuple[str, str]]:
    """Keys and their values as JSON text."""
    notes = plan.notes.get(name, Notes())
    ragged = bool(units) and isinstance(units[0], tuple)
    rows: list[Any] = list(units) if ragged else [units]
    if len({len(row) for row in rows}) > 1:
        raise PlanError("every list must keep the same number of units", where=name)
    if notes.role:
        yield "role", json.dumps(notes.role)
    if name in plan.sizes:
        yield "size", json.dumps(int(plan.sizes[name]))
    yield "count", json.dumps(len(rows[0]))
    if not ragged:
        yield "kept", json.dumps(ranges_text(rows[0]))
    else:
        listed = ",\n".join(f"    {json.dumps(ranges_text(row))}" for row in rows)
        yield "kept", f"[\n{listed}\n   ]"
    if notes.parameters:
        yield "parameters", json.dumps(notes.parameters)
    if notes.scores is not None:
        taken = {key: value for key, value in asdict(notes.scores).items() if value is not None}
        yield "scores", json.dumps(taken)
