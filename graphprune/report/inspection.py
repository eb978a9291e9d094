"""What `graphprune inspect` says: structures with their unit costs, and what is frozen and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from graphprune.axes import Atom, Expr, Product, Reason, Select, Sum, atoms, normal
from graphprune.errors import PlanError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.analysis.program import BaseProgram
    from graphprune.analysis.structure import Structure

Item = TypeVar("Item")

FIELDS = ("name", "role", "size", "prunable", "reason", "params", "macs", "members")


def as_data(program: BaseProgram) -> dict[str, Any]:
    """Everything about a program's structures as plain data."""
    cost = program.costs.total()
    return {
        "fingerprint": program.fingerprint,
        "params": cost.params,
        "macs": cost.macs,
        "bytes": cost.bytes,
        "input": str(program.workload),
        "inputs": dict(program.workload.shapes),
        "structures": [{key: getattr(s, key) for key in FIELDS} for s in program.structures],
        "frozen": [
            {"parameter": name, "dimension": dim, "reason": reason}
            for (name, dim), reason in program.frozen().items()
        ],
    }


def as_text(program: BaseProgram) -> RenderableType:
    """A table of the prunable structures, those that differ only in the layer in one row."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cost = program.costs.total()
    head = (
        f"{cost.params:,} parameters, {cost.macs:,} MACs ({program.workload}), "
        f"{cost.bytes:,} bytes of weights"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role")
    table.add_column("structures", overflow="fold")
    for title in ("units", "params/unit", "MACs/unit"):
        table.add_column(title, justify="right")
    prunable = [s for s in program.structures if s.prunable]
    prunable.sort(key=lambda s: s.role)
    prunable += program.sublayers
    for group in _alike(prunable, lambda s: (pattern(s.name), s.role, s.size, s.params, s.macs)):
        numbers = (f"{value:,}" for value in (group[0].size, group[0].params, group[0].macs))
        table.add_row(group[0].role or "-", span([s.name for s in group]), *numbers)
    return Group(Text(head), table, *(Text(line) for line in _frozen_lines(program)))


def explain(program: BaseProgram, parameter: str) -> list[dict[str, Any]]:
    """What each dimension of a parameter belongs to, who shares it, and what froze the rest.

    Returns:
        One row per dimension: ``axis``, its expression, atoms shown as ``role:size`` or, frozen,
        ``size!``; ``structures``, the prunable ones in it; ``shared``, structure to the other
        dimensions that carry it; ``frozen``, reasons; ``causes``, each reason with the operator,
        its node, module and the model's source line, where an operator is the cause.

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
    by_atom = {s.atom: s for s in program.structures if s.atom is not None}
    rows: list[dict[str, Any]] = []
    for dim, size in enumerate(program.parameters[parameter]):
        e = normal(program.axis(parameter, dim))
        found = list(dict.fromkeys(atoms(e)))
        touching = [by_atom[a] for a in found if a in by_atom]
        reasons = dict.fromkeys(a.reason for a in found if a.reason is not None)
        causes = [_cause(reason, program) for reason in reasons]
        rows.append(
            {
                "parameter": parameter,
                "dimension": dim,
                "size": size,
                "axis": _expression(e, by_atom),
                "structures": [s.name for s in touching if s.prunable],
                "shared": {s.name: _others(s, canonical, dim) for s in touching},
                "frozen": [str(r) for r in reasons] or ([] if found else ["an axis of size 1"]),
                "causes": causes,
            }
        )
    return rows


def explained(program: BaseProgram, parameter: str) -> list[str]:
    """`explain` as lines for people."""
    lines = []
    canonical = program.aliases.get(parameter, parameter)
    if canonical != parameter:
        lines.append(f"{parameter} is {canonical}, tied")
    for row in explain(program, parameter):
        lines.append(f"{parameter} dimension {row['dimension']}, {row['size']}: {row['axis']}")
        for name, others in row["shared"].items():
            s = program.by_name[name]
            if s.prunable:
                lines.append(f"  prunable: {s.role or 'no role'}, {s.size} units, structure {name}")
                lines += _sharers(others)
        lines += [f"  frozen: {reason}" for reason in row["frozen"] if not row["causes"]]
        for cause in row["causes"]:
            lines.append(f"  frozen: {cause['reason']}")
            if cause["operator"]:
                inside = f" in {cause['module']}" if cause["module"] else ""
                lines.append(f"    by {cause['operator']}{inside}")
            same = [n for n in row["shared"] if program.by_name[n].reason == cause["reason"]]
            lines += _sharers([place for n in same for place in row["shared"][n]])
    for stack in program.structures:
        lines += [
            f"leaves with layer {b.index} of {stack.name}"
            for b in stack.blocks
            if canonical in b.parameters
        ]
    return lines


def _expression(e: Expr, structures: Mapping[Atom, Structure]) -> str:
    def shown(e: Expr) -> str:
        match e:
            case Atom() as atom if atom.frozen:
                return f"{atom.size}!"
            case Atom() as atom:
                role = structures[atom].role if atom in structures else ""
                return f"{role}:{atom.size}" if role else str(atom.size)
            case Product(factors=()):
                return "1"
            case Product(factors=parts):
                return "(" + " * ".join(map(shown, parts)) + ")"
            case Sum(terms=parts):
                return "(" + " + ".join(map(shown, parts)) + ")"
            case Select(base=base, indices=indices):
                return f"{shown(base)}[{len(indices)} places]"

    text = shown(e)
    return text[1:-1] if isinstance(e, Product | Sum) and text.startswith("(") else text


def _others(structure: Structure, parameter: str, dim: int) -> list[str]:
    return [f"{p}:{d}" for p, d in structure.members if (p, d) != (parameter, dim)]


def _sharers(places: Sequence[str], most: int = 8) -> list[str]:
    """One line that names who shares an axis, layers that differ only in a number together."""
    groups = _alike(dict.fromkeys(places), lambda p: (pattern(p), p.rpartition(":")[2]))
    spans = [span(group) for group in groups]
    more = f" and {len(spans) - most} more" if len(spans) > most else ""
    return [f"    shared with {', '.join(spans[:most])}{more}"] if spans else []


def _cause(reason: Reason, program: BaseProgram) -> dict[str, Any]:
    """A reason with the operator behind it; the ends of the model and plain sizes have none."""
    operator, module = program.operator_of(reason.node) or (None, "")
    return {
        "reason": str(reason),
        "why": reason.why,
        "node": reason.node or None,
        "operator": operator,
        "module": module or None,
        "line": reason.line or None,
    }


def _frozen_lines(program: BaseProgram) -> list[str]:
    frozen = [
        (name, dim, reason)
        for (name, dim), reason in program.frozen().items()
        if program.aliases.get(name, name) in program.trainable
    ]
    lines = ["frozen:"] if frozen else []
    for same in _alike(frozen, lambda place: pattern(place[2])):
        spans = [
            f"{span([name for name, _, _ in group])}:{group[0][1]}"
            for group in _alike(same, lambda place: (pattern(place[0]), place[1]))
        ]
        shown = ", ".join(spans[:4]) + (f" and {len(spans) - 4} more" if spans[4:] else "")
        lines.append(f"  {shown}: {span([reason for _, _, reason in same])}")
    return lines


def _alike(items: Iterable[Item], key: Callable[[Item], object]) -> list[list[Item]]:
    """Groups of items with equal keys, in the order in which each was first seen."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def pattern(name: str) -> str:
    """A name without its numbers, which alike layers share."""
    return re.sub(r"\d+", "*", name)


def span(names: Sequence[str]) -> str:
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
