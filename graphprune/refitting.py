"""Treatments that choose the units of a structure and refit what reads them.

They see each consumer when all samples have reached it, in the model as it is by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from graphprune.axes.expr import IntArray
from graphprune.consumers import Consumer
from graphprune.plan import Units, rows_of
from graphprune.program import Program, Structure
from graphprune.solvers import Reconstruct, SecondMoment
from graphprune.solvers.factor import damp, solve_damped
from graphprune.solvers.obs import Problem, Surgeon
from graphprune.solvers.solved import relative_error
from graphprune.streaming import Group, Observer


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


@dataclass(eq=False)
class Gathered:
    """The second moment of what a part reads, and of the gaps of its weights."""

    where: str
    moment: SecondMoment | None = None
    gaps: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor) -> None:
        """See `graphprune.streaming.Observer`."""
        if self.moment is None:
            self.moment = SecondMoment(x.shape[-1], x.device)
        self.moment.add(x, self.where)

    def gap(self, parameter: str, x: Tensor, missing: Tensor) -> None:
        """See `graphprune.streaming.run.GapObserver`."""
        if parameter not in self.gaps:
            self.gaps[parameter] = x.new_zeros(missing.shape[1], x.shape[1])
            self.sums[parameter] = x.new_zeros(missing.shape[1], dtype=torch.float64)
        self.gaps[parameter].addmm_(missing.T, x)
        self.sums[parameter] += missing.sum(0, dtype=torch.float64)

    def fit(self, parameter: str, features: int, centred: bool) -> Fit:
        """What a weight is fitted to."""
        moment = self.moment or SecondMoment(features)
        tokens = max(moment.tokens, 1)
        mean = moment.means
        cross, gap = None, None
        if parameter in self.gaps:
            cross = self.gaps[parameter].double() / tokens
            gap = self.sums[parameter] / tokens
            if centred:
                cross -= torch.outer(gap, mean)
        return Fit(moment.centred() if centred else moment, cross, mean, gap)


@dataclass(frozen=True, eq=False)
class Fit:
    """Statistics of one part of a weight.

    Attributes:
        moment: of what it reads; about the mean where a bias makes up for that.
        cross: [out, in], E[g xᵀ] of the gap g, likewise; None without a gap.
        mean: [in], of what it reads.
        gap: [out], mean of the gap; None without a gap.
    """

    moment: SecondMoment
    cross: Tensor | None
    mean: Tensor
    gap: Tensor | None

    def shift(self, old: Tensor, new: Tensor) -> Tensor:
        """[out], float64: what a bias has to add."""
        change = (old.double() - new.double()) @ self.mean
        return change if self.gap is None else change + self.gap


@dataclass
class Refit:
    """Chooses units that are still open where their consumers are, and refits the consumers."""

    program: Program
    consumers: Mapping[str, tuple[Consumer, ...]]
    units: dict[str, Units]
    keep: dict[str, int]
    surgeon: Surgeon
    refit: Reconstruct | None
    reference: bool
    biases: Mapping[str, str]
    layers: list[Refitted] = field(default_factory=list)

    def observer(self, group: Group, part: int) -> Gathered:
        """See `graphprune.streaming.Treatment`."""
        return Gathered(f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """See `graphprune.streaming.Treatment`."""
        statistics = [cast("Gathered", one) for one in observers]
        for name, users in self.consumers.items():
            here = [c for c in users if c.group == group.index]
            if here and name not in self.units:
                problems = [
                    problem
                    for consumer in here
                    for problem in self._problems(group, consumer, statistics, weights)
                ]
                structure = self.program.by_name[name]
                self.units[name] = choose(self.surgeon, problems, structure, self.keep[name])
        for name in group.parameters:
            yield from self._refitted(group, name, statistics, weights)

    def record(self, group: Group) -> Any:
        """See `graphprune.streaming.run.Recording`."""
        here = {n for n, cs in self.consumers.items() if any(c.group == group.index for c in cs)}
        return {
            "units": {n: u for n, u in self.units.items() if n in here},
            "layers": [vars(e) for e in self.layers if e.parameter in group.parameters],
        }

    def recall(self, group: Group, record: Any) -> None:
        """See `graphprune.streaming.run.Recording`."""
        for name, units in record["units"].items():
            ragged = bool(units) and isinstance(units[0], list)
            self.units[name] = tuple(map(tuple, units)) if ragged else tuple(units)
        for entry in record["layers"]:
            self.layers.append(Refitted(**{**entry, "notes": tuple(entry["notes"])}))

    def _problems(
        self,
        group: Group,
        consumer: Consumer,
        statistics: Sequence[Gathered],
        weights: Mapping[str, Tensor],
    ) -> Iterable[Problem]:
        """One layer per part, on the columns that earlier choices have left."""
        name = consumer.parameter
        kept = self._kept(group, name)
        matrices = group.layout(name).matrices(weights[name])
        assert self.refit is not None
        for part, (weight, seen) in enumerate(zip(matrices, statistics, strict=True)):
            fit = seen.fit(name, weight.shape[1], name in self.biases)
            if not fit.moment.silent:
                yield problem(weight, fit.moment, fit.cross, consumer.units[part], kept[part],
                              self.refit.damping)  # fmt: skip

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
        self,
        group: Group,
        name: str,
        statistics: Sequence[Gathered],
        weights: Mapping[str, Tensor],
    ) -> Iterable[tuple[str, Tensor]]:
        layout, weight, bias = group.layout(name), weights[name], self.biases.get(name)
        matrices = layout.matrices(weight)
        kept = self._kept(group, name)
        new, shifts, before, after = [], [], [], []
        notes: list[str] = []
        for part, (matrix, seen) in enumerate(zip(matrices, statistics, strict=True)):
            mask = torch.from_numpy(kept[part].copy())
            fit = seen.fit(name, matrix.shape[1], bias is not None)
            cut = torch.where(mask, matrix.detach(), 0)
            found = cut
            if self.refit is not None:
                solved = self.refit.solve(matrix, fit.moment, mask, fit.cross)
                found = solved.weight
                notes += solved.notes
            new.append(found)
            shifts.append(fit.shift(matrix, found))
            if not fit.moment.silent:
                damping = 1e-4 if self.refit is None else self.refit.damping
                best = _best_weight(matrix, fit.moment, fit.cross, damping)
                before.append(relative_error(best, cut, fit.moment))
                after.append(relative_error(best, found, fit.moment))
        self.layers.append(
            Refitted(
                name,
                int((~kept).sum()),
                float(np.mean(before)) if before else 1.0,
                float(np.mean(after)) if after else 1.0,
                tuple(dict.fromkeys(notes)),
            )
        )
        yield name, layout.restored(torch.stack(new), weight.shape)
        if bias is not None:
            yield bias, (weights[bias].double() + torch.cat(shifts)).to(weights[bias].dtype)


@dataclass
class Survey:
    """Changes nothing; gathers the layers that read each structure, with dense statistics.

    Attributes:
        program: gives the structures.
        consumers: of each structure.
        biases: of their weights, where there are any.
        damping: see `Reconstruct`.
        decide: called with a structure and its layers when the last of them has been seen.
    """

    program: Program
    consumers: Mapping[str, tuple[Consumer, ...]]
    biases: Mapping[str, str]
    damping: float
    decide: Callable[[Structure, list[Problem]], None]
    waiting: dict[str, list[Problem]] = field(default_factory=dict)

    def observer(self, group: Group, part: int) -> Gathered:
        """See `graphprune.streaming.Treatment`."""
        return Gathered(f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """See `graphprune.streaming.Treatment`."""
        statistics = [cast("Gathered", one) for one in observers]
        for name, users in self.consumers.items():
            found = self.waiting.setdefault(name, [])
            for consumer in (c for c in users if c.group == group.index):
                matrices = group.layout(consumer.parameter).matrices(weights[consumer.parameter])
                centred = consumer.parameter in self.biases
                for part, (weight, seen) in enumerate(zip(matrices, statistics, strict=True)):
                    fit = seen.fit(consumer.parameter, weight.shape[1], centred)
                    if not fit.moment.silent:
                        units = consumer.units[part]
                        whole = np.ones(len(units), dtype=bool)
                        found.append(problem(weight, fit.moment, None, units, whole, self.damping))
            if users and users[-1].group == group.index:
                self.decide(self.program.by_name[name], self.waiting.pop(name))
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


def choose(surgeon: Surgeon, problems: Sequence[Problem], structure: Structure, keep: int) -> Units:
    """The units of a structure that stay, as a plan has them."""
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
