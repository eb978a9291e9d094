"""Structured pruning with weights that make up for what goes.

`obs` chooses units where their consumers read them and refits the consumers at once, so that every
choice sees the model as it has become. `reconstruct` refits the consumers for a plan, whoever made
it, to what the dense model computes: what a layer lacks because of the layers before it is closed
with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from graphprune.axes.expr import IntArray
from graphprune.consumers import Consumer, consumers
from graphprune.errors import PlanError
from graphprune.plan import Plan, Selection, Units, rows_of
from graphprune.program import Program, Structure
from graphprune.solvers import Reconstruct, SecondMoment
from graphprune.solvers.factor import damp, solve_damped
from graphprune.solvers.obs import FIXED, Problem, Surgeon
from graphprune.solvers.solved import relative_error
from graphprune.streaming import (
    Group,
    Observer,
    Sites,
    State,
    Step,
    apply_weights,
    batches,
    find_sites,
    stream,
)
from graphprune.streaming.layout import Experts, Layout


@dataclass(frozen=True)
class Refitted:
    """What became of one consumer.

    Attributes:
        parameter: its name.
        removed: columns that are zero now, summed over its parts.
        before: relative error of its output without the refit, the mean over its parts.
        error: the same with it. Both are measured against the best weights of full width.
        notes: what was unusual.
    """

    parameter: str
    removed: int
    before: float
    error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repaired:
    """A dense program whose weights suit a plan.

    Attributes:
        program: at full size, with zeros in the columns that the plan removes.
        plan: to be applied to it.
        layers: one entry per refitted consumer, in the order of treatment.
        untouched: structures of the plan that no refit could help, to the reason.
    """

    program: Program
    plan: Plan
    layers: tuple[Refitted, ...]
    untouched: Mapping[str, str]


def obs(
    program: Program,
    samples: Any,
    keep: Mapping[str, int],
    *,
    surgeon: Surgeon | None = None,
    damping: float = 1e-4,
    reference: bool = False,
    held: torch.dtype | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Repaired:
    """Choose units by structured optimal brain surgery, and refit what reads them.

    Args:
        program: a traced program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        keep: structure name to the number of units that stay (in each outer unit, where the
            structure is ragged).
        surgeon: how units are chosen.
        damping: see `graphprune.solvers.Reconstruct`.
        reference: see `reconstruct`.
        held: see `graphprune.streaming.stream`.
        progress: likewise.
        state: likewise.

    Raises:
        PlanError: a structure has no consumer that a statistic could see.
        CalibrationError: the statistics don't suffice.
    """
    structures = [program.by_name[name] for name in keep]
    found, sites = _consumers(program, structures)
    missing = [s.name for s in structures if not found[s.name]]
    if missing:
        raise PlanError(
            "obs can't choose units that no weight multiplies by",
            where=missing[0],
            why="its units meet in a product of activations, or what reads them can't be treated",
            hint="choose these by another score",
        )
    surgeon = surgeon or Surgeon()
    units: dict[str, Units] = {}
    spread = [s for s in structures if len({c.group for c in found[s.name]}) > 1]
    if spread:
        units = _chosen_together(program, samples, spread, keep, surgeon, damping, held)
    refit = Reconstruct(damping)
    treatment = _Treatment(program, found, units, dict(keep), surgeon, refit, reference)
    return _streamed(program, samples, sites, treatment, held, progress, state, {})


def reconstruct(
    program: Program,
    samples: Any,
    plan: Plan,
    *,
    damping: float = 1e-4,
    reference: bool = True,
    held: torch.dtype | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Repaired:
    """Refit the consumers of a plan's structures in closed form.

    Every consumer is fitted, by least squares on the columns that stay, to the output that it has
    with the dense weights on the same inputs. With `reference` it is fitted to its output in the
    dense model instead, or, where it writes into a residual stream, to what the stream lacks:
    errors of earlier layers are made up for where they can be.

    Args:
        program: a traced program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        plan: what stays.
        damping: see `graphprune.solvers.Reconstruct`.
        reference: run the dense model along. It costs another pass.
        held: see `graphprune.streaming.stream`.
        progress: likewise.
        state: likewise.

    Raises:
        PlanError: the plan doesn't belong to the program, or no consumer can be refitted.
    """
    selection = plan.bind(program)
    structures = [program.by_name[name] for name in plan.kept_units]
    found, sites = _consumers(program, structures)
    untouched = {
        s.name: "a layer" if s.blocks else "no weight multiplies by its units"
        for s in structures
        if not found[s.name]
    }
    units = dict(plan.kept_units)
    refit = Reconstruct(damping)
    treatment = _Treatment(program, found, units, {}, Surgeon(), refit, reference)
    masked = selection if reference else None
    return _streamed(program, samples, sites, treatment, held, progress, state, untouched, masked)


def _streamed(
    program: Program,
    samples: Any,
    sites: Sites,
    treatment: _Treatment,
    held: torch.dtype | None,
    progress: Callable[[Step], None] | None,
    state: State | None,
    untouched: Mapping[str, str],
    selection: Selection | None = None,
) -> Repaired:
    new = stream(
        program,
        sites,
        batches(program, samples),
        treatment,
        held=held,
        reference=treatment.reference,
        selection=selection,
        progress=progress,
        state=state,
    )
    sizes = {name: program.by_name[name].size for name in treatment.units}
    plan = Plan(program.fingerprint, treatment.units, sizes)
    return Repaired(apply_weights(program, new), plan, tuple(treatment.layers), untouched)


def _consumers(
    program: Program, structures: Sequence[Structure]
) -> tuple[dict[str, tuple[Consumer, ...]], Sites]:
    """The consumers of some structures, and the sites of no other weight.

    Raises:
        PlanError: there is none.
    """
    everything = find_sites(program, every=True)
    names = dict.fromkeys(
        c.parameter for cs in consumers(program, structures, everything).values() for c in cs
    )
    if not names:
        raise PlanError(
            "no weight multiplies by what is pruned",
            where=", ".join(s.name for s in structures[:3]),
            hint="leave the repair out",
        )
    sites = find_sites(program, include=list(names), every=True)
    return consumers(program, structures, sites), sites


def _chosen_together(
    program: Program,
    samples: Any,
    structures: Sequence[Structure],
    keep: Mapping[str, int],
    surgeon: Surgeon,
    damping: float,
    held: torch.dtype | None,
) -> dict[str, Units]:
    """Units of structures whose consumers stand at several places, by the dense model.

    The first consumer is reached before the last has been seen.
    """
    found, sites = _consumers(program, structures)
    chooser = _Chooser(program, found, dict(keep), surgeon, damping)
    stream(program, sites, batches(program, samples), chooser, held=held)
    return chooser.units


@dataclass(eq=False)
class _Statistic:
    """The second moment of what a part reads, and of the gaps of its weights."""

    where: str
    moment: SecondMoment | None = None
    gaps: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor) -> None:
        if self.moment is None:
            self.moment = SecondMoment(x.shape[-1], x.device)
        self.moment.add(x, self.where)

    def gap(self, parameter: str, x: Tensor, missing: Tensor) -> None:
        total = self.gaps.get(parameter)
        if total is None:
            total = self.gaps[parameter] = x.new_zeros(missing.shape[1], x.shape[1])
        total.addmm_(missing.T, x)

    def cross(self, parameter: str) -> Tensor | None:
        """[out, in], E[g xᵀ]; None where no gap was seen."""
        total = self.gaps.get(parameter)
        if total is None or self.moment is None:
            return None
        return total / max(self.moment.tokens, 1)


@dataclass
class _Treatment:
    """Chooses units that are still open where their consumers are, and refits the consumers."""

    program: Program
    consumers: Mapping[str, tuple[Consumer, ...]]
    units: dict[str, Units]
    keep: dict[str, int]
    surgeon: Surgeon
    refit: Reconstruct
    reference: bool
    layers: list[Refitted] = field(default_factory=list)

    def observer(self, group: Group, part: int) -> _Statistic:
        return _Statistic(f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        statistics = [cast("_Statistic", one) for one in observers]
        for name, users in self.consumers.items():
            here = [c for c in users if c.group == group.index]
            if here and name not in self.units:
                problems = [
                    problem
                    for consumer in here
                    for problem in self._problems(group, consumer, statistics, weights)
                ]
                structure = self.program.by_name[name]
                self.units[name] = _choose(self.surgeon, problems, structure, self.keep[name])
        for name in group.parameters:
            yield name, self._refitted(group, name, statistics, weights[name])

    def record(self, group: Group) -> Any:
        here = {n for n, cs in self.consumers.items() if any(c.group == group.index for c in cs)}
        return {
            "units": {n: u for n, u in self.units.items() if n in here},
            "layers": [vars(e) for e in self.layers if e.parameter in group.parameters],
        }

    def recall(self, group: Group, record: Any) -> None:
        for name, units in record["units"].items():
            ragged = bool(units) and isinstance(units[0], list)
            self.units[name] = tuple(map(tuple, units)) if ragged else tuple(units)
        for entry in record["layers"]:
            self.layers.append(Refitted(**{**entry, "notes": tuple(entry["notes"])}))

    def _problems(
        self,
        group: Group,
        consumer: Consumer,
        statistics: Sequence[_Statistic],
        weights: Mapping[str, Tensor],
    ) -> Iterable[Problem]:
        """One layer per part, on the columns that earlier choices have left."""
        name = consumer.parameter
        kept = self._kept(group, name)
        matrices = group.layout(name).matrices(weights[name])
        for part, (weight, seen) in enumerate(zip(matrices, statistics, strict=True)):
            if seen.moment is not None and not seen.moment.silent:
                yield problem(weight, seen.moment, seen.cross(name), consumer.units[part],
                              kept[part], self.refit.damping)  # fmt: skip

    def _kept(self, group: Group, parameter: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Bool [parts, in]: the columns of a weight that no decided structure removes."""
        kept: Any = True
        shape: tuple[int, ...] | None = None
        for name, users in self.consumers.items():
            for consumer in users:
                if consumer.parameter == parameter and consumer.group == group.index:
                    shape = consumer.units.shape
                    if name in self.units:
                        gone = removed_units(self.program.by_name[name], self.units[name])
                        kept = kept & ~np.isin(consumer.units, gone)
        assert shape is not None
        return np.broadcast_to(kept, shape)

    def _refitted(
        self, group: Group, name: str, statistics: Sequence[_Statistic], weight: Tensor
    ) -> Tensor:
        layout = group.layout(name)
        matrices = layout.matrices(weight)
        kept = self._kept(group, name)
        new, before, after = [], [], []
        notes: list[str] = []
        for part, (matrix, seen) in enumerate(zip(matrices, statistics, strict=True)):
            mask = torch.from_numpy(kept[part].copy())
            moment = seen.moment or SecondMoment(matrix.shape[1])
            solved = self.refit.solve(matrix, moment, mask, seen.cross(name))
            new.append(solved.weight)
            notes += solved.notes
            if solved.error is not None:
                best = _best_weight(matrix, moment, seen.cross(name), self.refit.damping)
                before.append(relative_error(best, torch.where(mask, matrix, 0), moment))
                after.append(relative_error(best, solved.weight, moment))
        self.layers.append(
            Refitted(
                name,
                int((~kept).sum()),
                float(np.mean(before)) if before else 1.0,
                float(np.mean(after)) if after else 1.0,
                tuple(dict.fromkeys(notes)),
            )
        )
        return layout.restored(torch.stack(new), weight.shape)


@dataclass
class _Chooser:
    """Changes nothing; chooses the units of each structure when its last consumer is there."""

    program: Program
    consumers: Mapping[str, tuple[Consumer, ...]]
    keep: dict[str, int]
    surgeon: Surgeon
    damping: float
    units: dict[str, Units] = field(default_factory=dict)
    waiting: dict[str, list[Problem]] = field(default_factory=dict)

    def observer(self, group: Group, part: int) -> _Statistic:
        return _Statistic(f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        statistics = [cast("_Statistic", one) for one in observers]
        for name, users in self.consumers.items():
            for consumer in (c for c in users if c.group == group.index):
                matrices = group.layout(consumer.parameter).matrices(weights[consumer.parameter])
                for part, (weight, seen) in enumerate(zip(matrices, statistics, strict=True)):
                    if seen.moment is not None and not seen.moment.silent:
                        units = consumer.units[part]
                        everything = np.ones(len(units), dtype=bool)
                        self.waiting.setdefault(name, []).append(
                            problem(weight, seen.moment, None, units, everything, self.damping)
                        )
            if users and users[-1].group == group.index:
                problems = self.waiting.pop(name, [])
                structure = self.program.by_name[name]
                self.units[name] = _choose(self.surgeon, problems, structure, self.keep[name])
        return ()


def problem(
    weight: Tensor,
    moment: SecondMoment,
    cross: Tensor | None,
    units: IntArray,
    kept: np.ndarray[Any, np.dtype[np.bool_]],
    damping: float,
) -> Problem:
    """A layer as the surgeon sees it: the best weights on the columns that are left.

    Args:
        weight: [out, in], dense.
        moment: of the inputs.
        cross: see `Reconstruct.solve`.
        units: [in]: the unit of each column, or -1.
        kept: [in] bool: the columns that are left.
        damping: in units of the mean of the diagonal.
    """
    hessian = damp(moment.hessian.double(), damping).matrix
    wide = weight.detach().double()
    targets = wide @ hessian
    if cross is not None:
        targets += cross.double()
    left = torch.from_numpy(np.flatnonzero(kept))
    hessian = hessian[left][:, left]
    best = torch.linalg.solve(hessian, targets[:, left].T).T
    return Problem(best.contiguous(), hessian, units[kept])


def _best_weight(
    weight: Tensor, moment: SecondMoment, cross: Tensor | None, damping: float
) -> Tensor:
    """The weights that close the gap as far as full width can."""
    if cross is None:
        return weight.detach()
    change, _ = solve_damped(moment.hessian.double(), cross.double().T.contiguous(), damping)
    return weight.detach().double() + change.T


def _choose(
    surgeon: Surgeon, problems: Sequence[Problem], structure: Structure, keep: int
) -> Units:
    outer = structure.within.size if structure.within is not None else 1
    kept = surgeon.choose(problems, structure.size, keep, outer) % structure.size
    rows = tuple(tuple(row) for row in kept.tolist())
    return rows if structure.within is not None else rows[0]


def removed_units(structure: Structure, units: Units) -> IntArray:
    """The numbers of the units that go, ``outer unit * size + unit`` where the axis is ragged."""
    rows = rows_of(units)
    outer = structure.within.size if structure.within is not None else 1
    stays = np.zeros((outer, structure.size), dtype=bool)
    for index in range(outer):
        stays[index, list(rows[index % len(rows)])] = True
    return np.flatnonzero(~stays).astype(np.int64)


def uses_experts(sites: Sites) -> bool:
    """Whether some weight is a stack of experts, whose rows differ between two models."""
    layouts: list[Layout] = [s.layout for g in sites.groups for s in g.sites]
    return any(isinstance(layout, Experts) for layout in layouts)


__all__ = ["FIXED", "Refitted", "Repaired", "obs", "reconstruct"]
