"""Two plans, or two outputs, side by side. Nothing here needs torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from graphprune.comparing.json import differences, numbers
from graphprune.errors import LoadError, PlanError
from graphprune.files import recover
from graphprune.files.json import parse_json, read_limited
from graphprune.files.paths import usable
from graphprune.files.yaml import read_yaml
from graphprune.plan.kept import Units, rows_of
from graphprune.plan.plan import Plan
from graphprune.plan.ranges import LARGEST, ranges_text
from graphprune.report.names import beside

LARGEST_REPORT = 1 << 28
"""Bytes of a report."""

Pair: TypeAlias = tuple[Any, Any]
"""A value of A and one of B; None for none."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        path: as it was given.
        plan: which units stay.
        report: what was measured; empty where there is no report.
        recipe: what it was made of; empty where there is none.
    """

    path: Path
    plan: Plan
    report: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Side:
        """Read an output (a directory, a ``.pt2`` or ``.onnx`` file), or the file of a plan.

        Raises:
            LoadError: there is none, or its report is no report.
            PlanError: its plan is none.
            RecipeError: its recipe is none.
        """
        if not usable(path).exists():
            raise LoadError("no such output or plan", where=str(path))
        if not path.is_dir() and path.suffix not in (".pt2", ".onnx"):
            return cls(path, Plan.load(path))
        recover(path)  # what lies beside a file may wait elsewhere
        report, recipe = beside(path, "report"), beside(path, "recipe")
        return cls(
            path,
            Plan.load(beside(path, "plan")),
            _report(report) if report.exists() else {},
            _mapping(read_yaml(recipe), recipe) if recipe.exists() else {},
        )


@dataclass(frozen=True)
class StructureDiff:
    """What two plans keep of one structure, in each unit of the axis around it if there is one.

    Attributes:
        role: as one of the plans notes it; "" where neither does.
        sizes: units in either model.
        only_first: for each outer unit, the units that only the first plan keeps.
        only_second: for each outer unit, the units that only the second plan keeps.
        both: for each outer unit, the units that both plans keep.
    """

    role: str
    sizes: tuple[int, int]
    only_first: tuple[tuple[int, ...], ...]
    only_second: tuple[tuple[int, ...], ...]
    both: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Units that only A keeps, only B, both."""
        first, second, both = (
            sum(map(len, rows)) for rows in (self.only_first, self.only_second, self.both)
        )
        return first, second, both

    @property
    def same(self) -> bool:
        """Whether both plans keep the same of the same."""
        return self.counts[:2] == (0, 0) and self.sizes[0] == self.sizes[1]

    def ranges(self) -> dict[str, str | list[str]]:
        """The units as ranges, a list of such for a ragged structure."""
        parts = {"only_a": self.only_first, "only_b": self.only_second, "both": self.both}
        found = {name: [ranges_text(row) for row in rows] for name, rows in parts.items()}
        return {name: rows if len(rows) > 1 else rows[0] for name, rows in found.items()}


@dataclass(frozen=True)
class Diff:
    """The difference of A and B.

    Attributes:
        fingerprints: of the models.
        structures: by name, those that both plans can have something to say of.
        unmatched: names that only one of the models may have, or of another form in the other.
        recipe: dotted key to the values, where the recipes differ.
        provenance: name of a version, the seed or a hash to the values, where they differ.
        numbers: what was measured of either slim model, also where it is the same.
    """

    fingerprints: tuple[str, str]
    structures: Mapping[str, StructureDiff]
    unmatched: tuple[tuple[str, ...], tuple[str, ...]]
    recipe: Mapping[str, Pair]
    provenance: Mapping[str, Pair]
    numbers: Mapping[str, Pair]

    @property
    def same_model(self) -> bool:
        """Whether both plans are for the same model, or for siblings of the same shapes."""
        return self.fingerprints[0] == self.fingerprints[1]

    @property
    def same(self) -> bool:
        """Whether the plans are the same; nothing else counts."""
        return self.same_model and all(one.same for one in self.structures.values())

    def roles(self) -> dict[str, tuple[int, int, int]]:
        """Role to the counts of `StructureDiff`, over all structures."""
        found: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for one in self.structures.values():
            found[one.role or "other"].append(one.counts)
        return {
            role: (sum(c[0] for c in counts), sum(c[1] for c in counts), sum(c[2] for c in counts))
            for role, counts in found.items()
        }

    def as_data(self, *, ranges: bool) -> dict[str, Any]:
        """Everything as plain data.

        Args:
            ranges: also which units they are.
        """
        names = ("only_a", "only_b", "both")
        return {
            "same": self.same,
            "same_model": self.same_model,
            "fingerprints": list(self.fingerprints),
            "roles": {
                role: dict(zip(names, counts, strict=True)) for role, counts in self.roles().items()
            },
            "structures": {
                name: {
                    "role": one.role,
                    "sizes": list(one.sizes),
                    **dict(zip(names, one.counts, strict=True)),
                    **({"units": one.ranges()} if ranges else {}),
                }
                for name, one in self.structures.items()
            },
            "unmatched": {"a": list(self.unmatched[0]), "b": list(self.unmatched[1])},
            **{
                key: {name: list(pair) for name, pair in getattr(self, key).items()}
                for key in ("recipe", "provenance", "numbers")
            },
        }


def compare(first: Side, second: Side) -> Diff:
    """The difference of two outputs or plans.

    Of one model, a structure that a plan doesn't list is whole. Of two models, only structures that
    both plans list are compared, by their names.

    Raises:
        PlanError: a plan doesn't say how many units a structure has, which the other cuts, or it
            says a number that no model has.
    """
    a, b = first.plan, second.plan
    same_model = a.fingerprint == b.fingerprint
    structures: dict[str, StructureDiff] = {}
    unmatched: tuple[list[str], list[str]] = ([], [])
    for name in dict.fromkeys([*a.kept_units, *b.kept_units]):
        listed = [name in plan.kept_units for plan in (a, b)]
        found = _structure(a, b, name) if same_model or all(listed) else None
        if found is not None:
            structures[name] = found
            continue
        for names, there in zip(unmatched, listed, strict=True):
            names += [name] if there else []
    return Diff(
        (a.fingerprint, b.fingerprint),
        structures,
        (tuple(unmatched[0]), tuple(unmatched[1])),
        {key: (one, other) for key, one, other in differences(first.recipe, second.recipe)}
        if first.recipe and second.recipe
        else {},
        dict(_provenance(first.report, second.report)),
        _numbers(first.report, second.report),
    )


def _structure(a: Plan, b: Plan, name: str) -> StructureDiff | None:
    """One structure in both plans; None where its units lie in other numbers of outer units."""
    sizes = _size(a, b, name), _size(b, a, name)
    rows = [
        _rows(plan.kept_units.get(name), size) for plan, size in zip((a, b), sizes, strict=True)
    ]
    outer = max(map(len, rows))
    if any(len(one) not in (1, outer) for one in rows):
        return None
    pairs = zip(*(one * (outer // len(one)) for one in rows), strict=True)
    parts = [(set(x) - set(y), set(y) - set(x), set(x) & set(y)) for x, y in pairs]
    only_a, only_b, both = (tuple(tuple(sorted(p[i])) for p in parts) for i in range(3))
    notes = [plan.notes[name].role for plan in (a, b) if name in plan.notes]
    return StructureDiff(next(filter(None, notes), ""), sizes, only_a, only_b, both)


def _size(plan: Plan, other: Plan, name: str) -> int:
    """Units of a structure; one that a plan doesn't list has as many as the other says."""
    known = plan.sizes if name in plan.kept_units else other.sizes
    size = known.get(name, other.sizes.get(name))
    if size is None:
        raise PlanError(
            "a plan doesn't say how many units a structure has",
            where=name,
            hint='add "size" to its entry; graphprune inspect tells it',
        )
    if size > LARGEST:
        raise PlanError(f"no structure has {size:,} units", where=name)
    return size


def _rows(units: Units | None, size: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(size)),) if units is None else rows_of(units)


def _provenance(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Pair]]:
    one, other = a.get("provenance"), b.get("provenance")
    if isinstance(one, dict) and isinstance(other, dict):
        for key, x, y in differences(one, other):
            yield key, (x, y)


def _numbers(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    one, other = dict(_measured(a)), dict(_measured(b))
    return {key: (one.get(key), other.get(key)) for key in dict.fromkeys([*one, *other])}


def _measured(report: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """What was measured of a slim model."""
    run = report.get("run")
    latency = run.get("latency") if isinstance(run, dict) else None
    yield from numbers(report.get("after"))
    if isinstance(latency, dict):
        taken = numbers(latency.get("after"), "latency")
        yield from (pair for pair in taken if pair[0].endswith(".seconds"))
    yield from numbers({"max_abs_error": report.get("max_abs_error")})


def _report(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(parse_json(read_limited(path, LARGEST_REPORT)), path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise LoadError("can't read the report", where=str(path), why=why) from error


def _mapping(data: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise LoadError("the file holds something else", where=str(path), why="it is no mapping")
    return data
