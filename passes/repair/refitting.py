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

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.passes.repair.refitted import Refitted
from graphprune.passes.shared.gaps import Fit, Gathered, gathered
from graphprune.plan.kept import Units, rows_of
from graphprune.solvers import Reconstruct, SecondMoment
from graphprune.solvers.factor import damp
from graphprune.solvers.gap import GapClosing
from graphprune.solvers.obs import Problem, Surgeon
from graphprune.streaming import Group, Observer
from graphprune.streaming.consumers import Consumer

_ROUNDING = 1e-9
"""Relative squared error that two runs of the same model in float32 stay far below."""


@dataclass
class Refit:
    """Chooses units that are still open where their consumers are, and refits the consumers."""

    program: BaseProgram
    consumers: Mapping[str, tuple[Consumer, ...]]
    units: dict[str, Units]
    keep: dict[str, int]
    surgeon: Surgeon
    refit: Reconstruct | None
    reference: bool
    biases: Mapping[str, str]
    closing: GapClosing = field(default_factory=GapClosing)
    layers: list[Refitted] = field(default_factory=list)

    def observer(self, group: Group, part: int) -> Gathered:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""
        return gathered(group, part, 1 if self.refit is None else 2)

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Change the weights of a group."""
        statistics = [cast("Gathered", one) for one in observers]
        for name, users in self.consumers.items():
            here = [c for c in users if c.group == group.index]
            if here and name not in self.units:
                problems = [
                    problem
                    for consumer in here
                    for problem in self.problems(group, consumer, statistics, weights)
                ]
                structure = self.program.by_name[name]
                self.units[name] = choose(self.surgeon, problems, structure, self.keep[name])
        for name in group.parameters:
            yield from self._refitted(group, name, statistics, weights)

    def record(self, group: Group) -> Any:
        """What was decided for a group, as JSON data."""
        here = {n for n, cs in self.consumers.items() if any(c.group == group.index for c in cs)}
        return {
            "units": {n: u for n, u in self.units.items() if n in here},
            "layers": [vars(e) for e in self.layers if e.parameter in group.parameters],
        }

    def recall(self, group: Group, record: Any) -> None:
        """Take up a decision of an interrupted run."""
        for name, units in record["units"].items():
            ragged = bool(units) and isinstance(units[0], list)
            self.units[name] = tuple(map(tuple, units)) if ragged else tuple(units)
        for entry in record["layers"]:
            self.layers.append(Refitted(**{**entry, "notes": tuple(entry["notes"])}))

    def problems(
        self,
        group: Group,
        consumer: Consumer,
        statistics: Sequence[Gathered],
        weights: Mapping[str, Tensor],
    ) -> Iterable[Problem]:
        """One layer per part, on the columns that earlier choices have left."""
        name = consumer.parameter
        kept = self.kept(group, name)
        matrices = group.layout(name).matrices(weights[name])
        assert self.refit is not None
        for part, (weight, seen) in enumerate(zip(matrices, statistics, strict=True)):
            fit = seen.fits(name, weight.shape[1], name in self.biases)[0]
            if not fit.moment.silent:
                units = consumer.units[part]
                yield problem(weight, fit.moment, units, kept[part], self.refit.damping)

    def kept(self, group: Group, parameter: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
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
        if shape is None:  # it reads nothing that is pruned
            matrices = group.layout(parameter).matrices(self.program.weights[parameter])
            shape = (matrices.shape[0], matrices.shape[2])
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
        kept = self.kept(group, name)
        new, shifts = [], []
        errors: list[list[float]] = []
        notes: list[str] = []
        for part, (matrix, seen) in enumerate(zip(matrices, statistics, strict=True)):
            mask = torch.from_numpy(kept[part].copy()).to(matrix.device)
            fits = seen.fits(name, matrix.shape[1], bias is not None)
            cut = torch.where(mask, matrix.detach(), 0)
            found = cut
            if self.refit is not None:
                found, told = self._fitted(matrix, fits, mask)
                notes += told
            new.append(found)
            shifts.append(fits[0].shift(matrix, found))
            if not fits[0].moment.silent:
                errors.append(fits[0].errors(matrix, cut, found))
        before, after = zip(*errors, strict=True) if errors else ((1.0,), (1.0,))
        if kept.all() and (not errors or max(before) < _ROUNDING):
            return  # nothing was removed before it
        self.layers.append(
            Refitted(
                name,
                int((~kept).sum()),
                float(np.mean(before)),
                float(np.mean(after)),
                bias,
                tuple(dict.fromkeys(notes)),
            )
        )
        yield name, layout.restored(torch.stack(new), weight.shape)
        if bias is not None:
            yield bias, (weights[bias].double() + torch.cat(shifts)).to(weights[bias].dtype)

    def _fitted(
        self, old: Tensor, fits: Sequence[Fit], mask: Tensor
    ) -> tuple[Tensor, tuple[str, ...]]:
        """The weights refitted for what goes, the gap to the dense model closed as well, notes."""
        assert self.refit is not None
        whole, *halves = fits
        if len(halves) < 2 or any(h.moment.silent for h in halves):
            return self.refit.fit(old, whole.moment, mask)
        refit, base = self.refit.tuned(old, [h.moment for h in halves], mask)
        new, notes = refit.fit(old, whole.moment, mask)
        if refit is not self.refit:
            notes += (f"damped by {refit.damping:g}: few tokens",)
        if any(one.gap is None for one in fits):
            return new, notes
        index = mask.nonzero().squeeze(1)
        samples, every = [h.sample() for h in halves], whole.sample()
        if self.closing.too_few(every, index):
            notes += (f"gap not closed: {every.tokens} tokens for {len(index)} inputs",)
        learnt = [one.double() - old for one in base]
        result = new.double()
        result[:, index] += self.closing.change(samples, learnt, every, index)
        return result.to(new.dtype), notes


@dataclass
class Compensation(Refit):
    """Finds what biases have to add on the inputs of the dense model: no weight changes on the way.

    Attributes:
        found: new biases by parameter.
    """

    found: dict[str, Tensor] = field(default_factory=dict)

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Keep the new biases; no weight changes on the way."""
        added = set(self.biases.values())
        self.found.update(
            (n, new) for n, new in super().treat(group, observers, weights) if n in added
        )
        return ()

    def record(self, group: Group) -> Any:
        """What was decided for a group, as JSON data."""
        own = {self.biases.get(name) for name in group.parameters}
        biases = {n: new.tolist() for n, new in self.found.items() if n in own}
        return {**super().record(group), "biases": biases}

    def recall(self, group: Group, record: Any) -> None:
        """Take up a decision of an interrupted run."""
        super().recall(group, record)
        for name, values in record["biases"].items():
            self.found[name] = torch.tensor(values, dtype=self.program.weights[name].dtype)


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

    program: BaseProgram
    consumers: Mapping[str, tuple[Consumer, ...]]
    biases: Mapping[str, str]
    damping: float
    decide: Callable[[Structure, list[Problem]], None]
    waiting: dict[str, list[Problem]] = field(default_factory=dict)

    def observer(self, group: Group, part: int) -> Gathered:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""
        return gathered(group, part, 1)

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Gather the layers of each structure; no weight changes."""
        statistics = [cast("Gathered", one) for one in observers]
        for name, users in self.consumers.items():
            found = self.waiting.setdefault(name, [])
            for consumer in (c for c in users if c.group == group.index):
                matrices = group.layout(consumer.parameter).matrices(weights[consumer.parameter])
                centred = consumer.parameter in self.biases
                for part, (weight, seen) in enumerate(zip(matrices, statistics, strict=True)):
                    fit = seen.fits(consumer.parameter, weight.shape[1], centred)[0]
                    if not fit.moment.silent:
                        units = consumer.units[part]
                        whole = np.ones(len(units), dtype=bool)
                        found.append(problem(weight, fit.moment, units, whole, self.damping))
            if users and users[-1].group == group.index:
                self.decide(self.program.by_name[name], self.waiting.pop(name))
        return ()


def problem(
    weight: Tensor,
    moment: SecondMoment,
    units: IntArray,
    kept: np.ndarray[Any, np.dtype[np.bool_]],
    damping: float,
) -> Problem:
    """A layer as the surgeon sees it: the best weights on the columns that are left.

    Args:
        weight: [out, in], dense.
        moment: of the inputs.
        units: [in]: the unit of each column, or -1.
        kept: [in] bool: the columns that are left.
        damping: in units of the mean of the diagonal.
    """
    hessian = damp(moment.hessian.double(), damping).matrix
    wide = weight.detach().double()
    if kept.all():
        return Problem(wide, hessian, units)
    left = torch.from_numpy(np.flatnonzero(kept)).to(wide.device)
    targets = (wide @ hessian)[:, left]
    hessian = hessian[left][:, left]
    best = torch.linalg.solve(hessian, targets.T).T
    return Problem(best.contiguous(), hessian, units[kept])


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
