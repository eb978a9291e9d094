"""One-shot masks for a whole program: a solver at every site, on what its weights read.

The pieces are in `graphprune.solvers` (one layer) and `graphprune.streaming` (the way through the
graph); here they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.program import Program
from graphprune.solvers import (
    RIA,
    Magnitude,
    Norms,
    Pattern,
    SecondMoment,
    Solver,
    Statistic,
    Wanda,
)
from graphprune.streaming import (
    Group,
    Observer,
    State,
    Step,
    apply_weights,
    batches,
    find_sites,
    stream,
)


@dataclass(frozen=True)
class Layer:
    """What became of one parameter.

    Attributes:
        parameter: its name.
        weights: number of weights.
        removed: how many of them are zero now, and were not protected.
        error: relative error of the layer's output on the calibration data, the mean over its
            parts (experts, groups of channels); None where no solver could tell.
        notes: what was unusual.
    """

    parameter: str
    weights: int
    removed: int
    error: float | None
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of its weights that is gone."""
        return self.removed / self.weights


@dataclass(frozen=True)
class Sparse:
    """A program with zeros in place of what a mask removed.

    Attributes:
        program: saves in every format by `graphprune.apply` with an empty plan.
        layers: one entry per treated parameter, in the order of treatment. Those that a resumed
            run took from its files are missing.
        skipped: parameter to the reason why it was left alone.
    """

    program: Program
    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]

    @property
    def sparsity(self) -> float:
        """Over the treated parameters."""
        return sum(e.removed for e in self.layers) / sum(e.weights for e in self.layers)

    @property
    def sparsity_of_model(self) -> float:
        """Over all parameters of the model."""
        return sum(e.removed for e in self.layers) / self.program.costs.total().params


def sparsify(
    program: Program,
    samples: Any,
    solver: Solver,
    pattern: Pattern | Mapping[str, Pattern],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    held: torch.dtype | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Sparse:
    """Prune the weights of a program, each with the inputs that it has in the pruned model.

    Args:
        program: a traced program with weights; it isn't changed.
        samples: see `graphprune.streaming.batches`.
        solver: see `graphprune.solvers`.
        pattern: what masks may be; a mapping from parameter gives each its own.
        include: globs of parameters; see `graphprune.streaming.find_sites`.
        exclude: likewise.
        held: see `graphprune.streaming.stream`.
        progress: likewise.
        state: likewise.

    Raises:
        RecipeError: the mapping has no pattern for a parameter.
        PlanError: see `stream`.
        CalibrationError: see `Solver`.
    """
    sites = find_sites(program, include=include, exclude=exclude)
    if isinstance(pattern, Mapping):
        missing = [name for name in sites.parameters if name not in pattern]
        if missing:
            raise RecipeError(
                "there is no pattern for a parameter",
                where=missing[0],
                why=f"{len(missing)} of {len(sites.parameters)} have none",
                hint="give every one its own, or exclude the rest",
            )
    treatment = _OneShot(solver, pattern)
    new = stream(
        program,
        sites,
        batches(program, samples),
        treatment,
        held=held,
        progress=progress,
        state=state,
    )
    return Sparse(apply_weights(program, new), tuple(treatment.layers), sites.skipped)


@dataclass
class _Observer:
    """A statistic that learns its width from the first rows."""

    kind: type[Norms] | type[SecondMoment]
    where: str
    statistic: Norms | SecondMoment | None = None

    def add(self, x: Tensor) -> None:
        if self.statistic is None:
            self.statistic = self.kind(x.shape[-1], x.device)
        self.statistic.add(x, self.where)


@dataclass
class _OneShot:
    """Solves each part of each weight; a part that has seen no token falls back to magnitude."""

    solver: Solver
    pattern: Pattern | Mapping[str, Pattern]
    layers: list[Layer] = field(default_factory=list)

    def observer(self, group: Group, part: int) -> _Observer:
        # Scores that only weigh columns need no correlations.
        light = isinstance(self.solver, Wanda | RIA | Magnitude)
        return _Observer(Norms if light else SecondMoment, f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        seen = [cast("_Observer", one).statistic for one in observers]  # made by `observer`
        for name in group.parameters:
            yield name, self._solved(group, name, seen, weights[name])

    def _solved(
        self, group: Group, name: str, statistics: Sequence[Statistic | None], weight: Tensor
    ) -> Tensor:
        layout = group.layout(name)
        matrices = layout.matrices(weight)
        pattern = self.pattern[name] if isinstance(self.pattern, Mapping) else self.pattern
        found = [
            self.solver.solve(
                matrix, SecondMoment(matrix.shape[1]) if seen is None else seen, pattern
            )
            for matrix, seen in zip(matrices, statistics, strict=True)
        ]
        errors = [s.error for s in found if s.error is not None]
        self.layers.append(
            Layer(
                name,
                weight.numel(),
                sum(int((~s.mask).sum()) for s in found),
                sum(errors) / len(errors) if errors else None,
                tuple(_counted(note for s in found for note in s.notes)),
            )
        )
        return layout.restored(torch.stack([s.weight for s in found]), weight.shape)


def _counted(notes: Iterable[str]) -> Iterator[str]:
    """Each note once, with the number of parts that it is about."""
    counts: dict[str, int] = {}
    for note in notes:
        counts[note] = counts.get(note, 0) + 1
    for note, count in counts.items():
        yield note if count == 1 else f"{note} ({count} parts)"
