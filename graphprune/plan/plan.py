"""The plan: which units stay. Data, independent of files and frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.axes import Expr, Keep, Ragged, atoms, count, indices, touched
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.files import write_text
from graphprune.files.json import shown
from graphprune.plan.json import Entries, parse_plan, read_plan
from graphprune.plan.kept import Units, is_ragged, rows_of
from graphprune.plan.notes import Notes, ScoreSummary, notes_of
from graphprune.plan.text import plan_text

if TYPE_CHECKING:
    from graphprune.analysis.program import BaseProgram
    from graphprune.analysis.structure import Block, Structure


@dataclass(frozen=True)
class Selection:
    """A plan bound to a program: masks per atom, and the layers to cut out.

    Attributes:
        keep: masks of the pruned atoms.
        cuts: stack path to the layers that are removed, ascending, and name of a structure of
            branches to the branches of other layers.
    """

    keep: Keep
    cuts: Mapping[str, tuple[Block, ...]]

    @cached_property
    def removed_parameters(self) -> frozenset[str]:
        """Parameters that leave with removed layers."""
        return frozenset(p for blocks in self.cuts.values() for b in blocks for p in b.parameters)

    @cached_property
    def removed_nodes(self) -> frozenset[str]:
        """Graph values that leave with removed layers."""
        return frozenset(n for blocks in self.cuts.values() for b in blocks for n in b.nodes)


@dataclass(frozen=True)
class Plan:
    """Kept units of every structure that loses some, in the program's original coordinates.

    Attributes:
        fingerprint: of the program it was made for.
        kept_units: structure name to its kept units, ascending; for a ragged structure one such
            list per index of the axis around it.
        sizes: structure name to its number of units before pruning.
        notes: structure name to what people want to know of it; nothing depends on them, and plans
            with other notes are equal.
    """

    fingerprint: str
    kept_units: Mapping[str, Units]
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Notes] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, units in self.kept_units.items():
            for row in rows_of(units):
                wrong = (
                    [unit for unit in row if not _is_whole(unit)]
                    if {*map(type, row)} - {int}
                    else ()
                )
                if wrong:
                    raise PlanError(
                        "kept units are not whole numbers",
                        where=f"structure {name}",
                        why=f"{shown(wrong[0])} is none",
                        hint="list every kept unit once, in ascending order, counted from 0",
                    )
                if list(row) != sorted(set(row)):
                    raise PlanError(
                        "kept units are not ascending and distinct",
                        where=f"structure {name}",
                        hint="list every kept unit once, in ascending order",
                    )

    def bind(self, program: BaseProgram) -> Selection:
        """The masks and cuts that the plan means for `program`.

        Raises:
            PlanError: the plan was made for another model, or removes what can't be removed.
        """
        if self.fingerprint != program.fingerprint:
            raise PlanError(
                "the plan doesn't belong to this model",
                why=f"it was made for a model with fingerprint {self.fingerprint}, this one has "
                f"{program.fingerprint} (parameter shapes or structures differ)",
                hint="make a new plan for this model with `graphprune compile --dry-run`",
            )
        keep: dict[Any, Any] = {}
        cuts: dict[str, tuple[Block, ...]] = {}
        for name, units in self.kept_units.items():
            structure = program.by_name.get(name)
            if structure is None:
                raise PlanError("unknown structure in plan", where=name)
            _check(structure, units, self.sizes.get(name))
            if structure.blocks:
                cuts[name] = _cut(structure, units)
            else:
                keep[structure.atom] = _mask(structure, units)
        for e, least, above in program.typing.minima:
            least = least if above is None else count(above, keep) + 1
            if touched(e, keep) and count(e, keep) < least:
                raise PlanError(
                    f"an operator needs {least} indices of an axis, and the plan leaves "
                    f"{count(e, keep)}",
                    where=", ".join(n for n in structures_of(program, e) if n in self.kept_units),
                    hint="keep more units of these structures",
                )
        left = ((n, _of_kept_layers(c, cuts.get(program.by_name[n].parent, ())))
                for n, c in cuts.items())  # fmt: skip
        return Selection(keep, {n: c for n, c in left if c})

    def kept(self, program: BaseProgram) -> dict[str, tuple[IntArray, ...]]:
        """Kept indices of every parameter and buffer, in original coordinates.

        Returns:
            Name to one ascending index array per dimension; all empty for a removed parameter.
        """
        selection = self.bind(program)
        gone = program.gone_with([b for blocks in selection.cuts.values() for b in blocks])
        empty = np.zeros(0, dtype=np.int64)
        result = {}
        for name, dims in program.typing.parameters.items():
            if program.aliases.get(name, name) in gone:
                result[name] = tuple(empty for _ in dims)
            else:
                result[name] = tuple(indices(d, selection.keep) for d in dims)
        return result

    def noted(self, program: BaseProgram, scores: Mapping[str, ScoreSummary] | None = None) -> Plan:
        """The plan with roles and parameters as `program` has them.

        Args:
            program: what it was made for.
            scores: structure name to a summary of its scores; others stay as they were noted.
        """
        known = {name: notes.scores for name, notes in self.notes.items()} | dict(scores or {})
        found = {name: program.by_name[name] for name in self.kept_units if name in program.by_name}
        return replace(self, notes={n: notes_of(s, known.get(n)) for n, s in found.items()})

    def to_json(self) -> str:
        """The plan as JSON text, the same for the same plan; see `graphprune.plan.text`."""
        return plan_text(Entries(self.fingerprint, self.kept_units, self.sizes, self.notes))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file is missing or is no plan of a known schema.
        """
        path = Path(path)
        return cls.from_json(read_plan(path), where=str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "") -> Plan:
        """Parse what `to_json` wrote.

        Raises:
            PlanError: the text is no plan of a known schema; see `graphprune.plan.json`.
        """
        found = parse_plan(text, where)
        return cls(found.fingerprint, found.kept, found.sizes, found.notes)


def structures_of(program: BaseProgram, e: Expr) -> list[str]:
    """Names of the structures that make up `e`."""
    own = set(atoms(e))
    return [s.name for s in program.structures if s.atom in own]


def _is_whole(unit: Any) -> bool:
    return isinstance(unit, int | np.integer) and not isinstance(unit, bool)


def _check(structure: Structure, units: Units, size: int | None) -> None:
    if not structure.prunable:
        raise PlanError(
            "a frozen structure can't be pruned", where=structure.name, why=structure.reason
        )
    if size not in (None, structure.size):
        raise PlanError(
            f"the plan is for {size} units, and the model has {structure.size}",
            where=structure.name,
            hint="make a new plan for this model with `graphprune compile --dry-run`",
        )
    for row in rows_of(units):
        if not row or row[0] < 0 or row[-1] >= structure.size:
            raise PlanError(
                f"kept units must be 1 to {structure.size} of the {structure.size} units",
                where=structure.name,
                hint="keep at least one unit; units are counted from 0",
            )


def _of_kept_layers(branches: tuple[Block, ...], layers: Iterable[Block]) -> tuple[Block, ...]:
    """The branches that don't go with one of the layers that are removed."""
    gone = {value for layer in layers for value in layer.nodes}
    return tuple(b for b in branches if b.exit not in gone)


def _cut(structure: Structure, units: Units) -> tuple[Block, ...]:
    gone = set(range(structure.size)) - set(units)
    fixed = gone - {b.index for b in structure.blocks}
    if fixed:
        raise PlanError(
            f"layers {sorted(fixed)} can't be removed",
            where=structure.name,
            why="the rest of the graph reads more of them than one value on the residual path",
        )
    return tuple(b for b in structure.blocks if b.index in gone)


def _mask(structure: Structure, units: Units) -> Any:
    rows = rows_of(units)
    masks = np.zeros((len(rows), structure.size), dtype=bool)
    for mask, kept in zip(masks, rows, strict=True):
        mask[list(kept)] = True
    if not is_ragged(units):
        return masks[0]
    if structure.within is None or len(rows) != structure.within.size:
        raise PlanError(
            "the units are listed once per index of an axis around them, and there is none of "
            f"size {len(rows)}",
            where=structure.name,
        )
    if len({len(r) for r in rows}) > 1:
        raise PlanError("every list must keep the same number of units", where=structure.name)
    return Ragged(structure.within, masks)


def stand_ins(selection: Selection) -> dict[str, str]:
    """The value that each removed layer computes, to the one that takes its place."""
    return {b.exit: b.entry for blocks in selection.cuts.values() for b in blocks}
