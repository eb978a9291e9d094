"""What `graphprune inspect` says: structures with their unit costs, and what is frozen and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from graphprune.axes import normal
from graphprune.errors import PlanError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.program import Program

Item = TypeVar("Item")

FIELDS = ("name", "role", "size", "prunable", "reason", "params", "macs", "members")


def as_data(program: Program) -> dict[str, Any]:
    """Everything about a program's structures as plain data."""
    cost = program.costs.total()
    return {
        "fingerprint": program.fingerprint,
        "params": cost.params,
        "macs": cost.macs,
        "bytes": cost.bytes,
        "structures": [{key: getattr(s, key) for key in FIELDS} for s in program.structures],
        "frozen": [
            {"parameter": name, "dimension": dim, "reason": reason}
            for (name, dim), reason in program.frozen().items()
        ],
    }


def as_text(program: Program) -> RenderableType:
    """A table of the prunable structures, those that differ only in the layer in one row."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cost = program.costs.total()
    head = f"{cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role")
    table.add_column("structures", overflow="fold")
    for title in ("units", "params/unit", "MACs/unit"):
        table.add_column(title, justify="right")
    prunable = [s for s in program.structures if s.prunable]
    prunable.sort(key=lambda s: s.role)
    for group in _alike(prunable, lambda s: (_pattern(s.name), s.role, s.size, s.params, s.macs)):
        numbers = (f"{value:,}" for value in (group[0].size, group[0].params, group[0].macs))
        table.add_row(group[0].role or "-", _span([s.name for s in group]), *numbers)
    return Group(Text(head), table, *(Text(line) for line in _frozen_lines(program)))


def explain(program: Program, parameter: str) -> list[dict[str, Any]]:
    """What each dimension of a parameter belongs to, and why the rest of it can't be pruned.

    Raises:
        PlanError: there is no such parameter; names the nearest.
    """
    if parameter not in program.parameters:
        close = difflib.get_close_matches(parameter, program.parameters, n=1, cutoff=0.3)
        raise PlanError(
            f"the model has no parameter '{parameter}'",
            hint=f"did you mean '{close[0]}'?" if close else "see graphprune inspect --json",
        )
    canonical = program.aliases.get(parameter, parameter)
    frozen = program.frozen()
    rows: list[dict[str, Any]] = []
    for dim, size in enumerate(program.parameters[parameter]):
        touching = [s for s in program.structures if (canonical, dim) in s.members and s.atom]
        row = {
            "parameter": parameter,
            "dimension": dim,
            "size": size,
            "axis": repr(normal(program.axis(parameter, dim))),
            "structures": [s.name for s in touching if s.prunable],
            "frozen": [s.reason for s in touching if not s.prunable],
        }
        if (parameter, dim) in frozen and not row["frozen"]:
            row["frozen"] = [frozen[parameter, dim]]
        rows.append(row)
    return rows


def explained(program: Program, parameter: str) -> list[str]:
    """`explain` as lines for people."""
    lines = []
    for row in explain(program, parameter):
        lines.append(f"{parameter} dimension {row['dimension']}, {row['size']}: {row['axis']}")
        for name in row["structures"]:
            s = program.by_name[name]
            lines.append(f"  prunable: {s.role or 'no role'}, {s.size} units, structure {name}")
        lines += [f"  frozen: {reason}" for reason in row["frozen"]]
    return lines


def _frozen_lines(program: Program) -> list[str]:
    frozen = [
        (name, dim, reason)
        for (name, dim), reason in program.frozen().items()
        if program.aliases.get(name, name) in program.trainable
    ]
    lines = ["frozen:"] if frozen else []
    for same in _alike(frozen, lambda place: _pattern(place[2])):
        spans = [
            f"{_span([name for name, _, _ in group])}:{group[0][1]}"
            for group in _alike(same, lambda place: (_pattern(place[0]), place[1]))
        ]
        shown = ", ".join(spans[:4]) + (f" and {len(spans) - 4} more" if spans[4:] else "")
        lines.append(f"  {shown}: {_span([reason for _, _, reason in same])}")
    return lines


def _alike(items: Iterable[Item], key: Callable[[Item], object]) -> list[list[Item]]:
    """Groups of items with equal keys, in the order in which each was first seen."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _span(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: ``model.layers.{0..29}.mlp``."""
    if len(names) == 1:
        return names[0]
    places = list(zip(*(re.findall(r"\d+", name) for name in names), strict=True))
    spans = iter([_numbers([int(n) for n in place]) for place in places])
    return re.sub(r"\d+", lambda match: next(spans), names[0])


def _numbers(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    found = sorted(set(values))
    if low == high:
        return str(low)
    whole = found == list(range(low, high + 1))
    return f"{{{low}..{high}}}" if whole else "{" + ",".join(map(str, found)) + "}"
