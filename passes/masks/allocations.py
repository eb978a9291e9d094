"""Layer budgets of one-shot masks: how much of each weight goes, for one sparsity of all.

The arithmetic is in `graphprune.solvers.budget`. Here are the numbers that it works on: outlier
ratios and errors from one pass of the samples through the dense model, or the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from graphprune.analysis.blocks import positions
from graphprune.analysis.program import BaseProgram
from graphprune.checkpoints.memory import page_out
from graphprune.errors import CalibrationError, RecipeError
from graphprune.passes.masks.collect import Collector, collected
from graphprune.passes.masks.wanda import Wanda, wanda_scores
from graphprune.solvers import Moments, Norms, SecondMoment, Solver, Statistic, Unstructured
from graphprune.solvers.budget import (
    FLOOR,
    below_threshold,
    in_whole,
    least_error,
    outlier_ratio,
    owl,
)
from graphprune.solvers.precision import exact
from graphprune.solvers.solved import innermost, statistic_of, widened
from graphprune.streaming import Group, Observer, Sites, Treatment

Shares: TypeAlias = Mapping[str, Sequence[float]]
"""Parameter to the sparsity of each of its parts, from 0 to 1."""

Watch: TypeAlias = Callable[[Treatment], object]
"""Streams the samples through the dense model with a treatment that changes nothing."""


class Budget(Protocol):
    """Deals the sparsity of a model to its weights.

    One that runs no samples says so by an attribute ``needs_data`` that is false: no data is read
    for it.
    """

    def shares(self, program: BaseProgram, sites: Sites, sparsity: float, watch: Watch) -> Shares:
        """The sparsity of every part of every treated weight.

        Args:
            program: the dense one.
            sites: what is treated.
            sparsity: over all weights of `sites`, at least 0 and below 1.
            watch: runs the samples; a budget that needs no data doesn't call it.
        """


@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every weight."""

    needs_data: ClassVar[bool] = False

    def shares(self, program: BaseProgram, sites: Sites, sparsity: float, watch: Watch) -> Shares:
        """The sparsity of every part of every treated weight."""
        return _of_parts(sites, dict.fromkeys(sites.parameters, sparsity))


@dataclass(frozen=True)
class OWL:
    """More density for layers with more outliers; see `graphprune.solvers.owl`.

    An outlier has a Wanda score above `threshold` times the mean score of its layer. Parts that
    have seen no token have no scores; a layer of such parts only has the mean ratio of the others.

    Attributes:
        spread: lambda; how far a layer's sparsity may be from the mean before densities are cut.
        threshold: M.
        per: what has one ratio and one sparsity: a layer of the model (all weights of one block of
            a stack, as in the paper; where there are no stacks, the weights that read one value),
            or a single weight.
    """

    needs_data: ClassVar[bool] = True
    spread: float = 0.08
    threshold: float = 5.0
    per: Literal["layer", "weight"] = "layer"

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1 or self.threshold <= 0 or self.per not in ("layer", "weight"):
            raise RecipeError(
                "OWL takes a spread from 0 to below 1, a threshold above 0, and per layer or weight"
            )

    def shares(self, program: BaseProgram, sites: Sites, sparsity: float, watch: Watch) -> Shares:
        """The sparsity of every part of every treated weight."""
        norms: dict[str, list[Statistic | None]] = {}

        def look(group: Group, seen: list[Statistic | None], _: Mapping[str, Tensor]) -> None:
            norms.update(dict.fromkeys(group.parameters, seen))

        watch(Watching(Norms, look))
        layers = (
            layers_of(program, sites) if self.per == "layer" else [[p] for p in sites.parameters]
        )
        ratios = [
            outlier_ratio(scores, self.threshold) if scores else None
            for scores in (_Scores(program, sites, names, norms) for names in layers)
        ]
        known = [r for r in ratios if r is not None] or [0.0]
        filled = [sum(known) / len(known) if r is None else r for r in ratios]
        found = owl(filled, [_size(program, names) for names in layers], sparsity, self.spread)
        dealt = {name: s for names, s in zip(layers, found, strict=True) for name in names}
        return _of_parts(sites, dealt)


@dataclass(frozen=True)
class Sensitivity:
    """The sparsities for which the errors of all weights' outputs have the least sum.

    The errors are those of a quick solver at some sparsities, on the inputs of the dense model;
    see `graphprune.solvers.budget.least_error`. A weight that has seen no token gets the mean.
    Relative errors are of rows that are scaled to one size: a few tokens with activations a
    thousand times as large as all others', as language models have them, would decide alone.

    Attributes:
        bound: how far a sparsity may be from the mean.
        levels: sparsities that are tried for every weight, 2 or more.
        solver: what tries them.
        error: squared change of the output relative to the squared output, over rows of one size;
            or per row, as rows are.
    """

    needs_data: ClassVar[bool] = True
    bound: float = 0.05
    levels: int = 5
    solver: Solver = field(default_factory=Wanda)
    error: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        if not 0 < self.bound < 1 or self.levels < 2 or self.error not in ("relative", "absolute"):
            raise RecipeError(
                "a budget by sensitivity takes a bound between 0 and 1, 2 levels or more, and "
                "relative or absolute errors"
            )

    def shares(self, program: BaseProgram, sites: Sites, sparsity: float, watch: Watch) -> Shares:
        """The sparsity of every part of every treated weight."""
        low, high = max(sparsity - self.bound, 0.0), sparsity + self.bound
        high = max(min(high, 1 - FLOOR), sparsity)
        steps = self.levels - 1
        levels = [low + (high - low) * i / steps for i in range(steps)] + [high]
        curves: dict[str, list[float]] = {}

        def look(group: Group, seen: list[Statistic | None], weights: Mapping[str, Tensor]) -> None:
            for name in group.parameters:
                weight = weights[name]
                _check_finite(name, weight)
                curve = self._curve(group.layout(name).matrices(weight), seen, levels)
                if curve is not None:
                    curves[name] = curve

        watch(Watching(Moments, look, even=self.error == "relative"))
        dealt = dict.fromkeys(sites.parameters, sparsity)
        if curves:
            sizes = [_size(program, [name]) for name in curves]
            found = least_error(levels, list(curves.values()), sizes, sparsity)
            dealt |= dict(zip(curves, found, strict=True))
        return _of_parts(sites, dealt)

    def _curve(
        self, matrices: Tensor, statistics: Sequence[Statistic | None], levels: Sequence[float]
    ) -> list[float] | None:
        """The error of a weight at each level; None without data."""
        lost, energy, rows = [0.0] * len(levels), 0.0, 0
        for matrix, seen in zip(matrices, statistics, strict=True):
            if not isinstance(seen, Moments) or seen.silent:
                continue
            wide, rows = widened(matrix), rows + seen.tokens
            hessian = seen.hessian.to(wide)
            energy += seen.tokens * _energy(wide, hessian)
            light = statistic_of(self.solver) is Norms
            given = _norms(seen) if light else seen  # a solver would measure its error otherwise
            for i, level in enumerate(levels):
                solved = self.solver.solve(matrix, given, Unstructured(level))
                lost[i] += seen.tokens * _energy(wide - widened(solved.weight), hessian)
        if energy <= 0:
            return None
        return [e / (energy if self.error == "relative" else rows) for e in lost]


@dataclass(frozen=True)
class Global:
    """The sparsities that one threshold for the magnitudes of all weights leads to.

    With `graphprune.passes.masks.magnitude.Magnitude`, the mask is that of the threshold: weights
    compete with those of all other layers, and exactly ``round(sparsity * count)`` of all go. It
    needs no data.
    """

    needs_data: ClassVar[bool] = False

    def shares(self, program: BaseProgram, sites: Sites, sparsity: float, watch: Watch) -> Shares:
        """The sparsity of every part of every treated weight."""
        names = [(g.layout(n), n) for g in sites.groups for n in g.parameters]

        def read() -> Iterator[Tensor]:
            for layout, name in names:
                weight = program.weights[name].detach()
                _check_finite(name, weight)
                yield from layout.matrices(weight)
                page_out(weight)

        counts = iter(below_threshold(read, sparsity))
        found = {}
        for layout, name in names:
            size = _size(program, [name]) // layout.parts
            found[name] = [next(counts) / size for _ in range(layout.parts)]
        return found


def whole_shares(program: BaseProgram, sites: Sites, shares: Shares, solver: Solver) -> Shares:
    """Shares that a solver meets exactly, of the same sum; see `in_whole`."""
    by_row = getattr(innermost(solver), "group", "layer") == "row"
    names = [(n, g.layout(n)) for g in sites.groups for n in g.parameters]
    sizes, grains = [], []
    for name, layout in names:
        matrices = layout.matrices(torch.empty(program.parameters[name], device="meta"))
        sizes += [matrices[0].numel()] * layout.parts
        grains += [matrices.shape[1] if by_row else 1] * layout.parts
    dealt = iter(in_whole([s for n, _ in names for s in shares[n]], sizes, grains))
    return {name: [next(dealt) for _ in range(layout.parts)] for name, layout in names}


def layers_of(program: BaseProgram, sites: Sites) -> list[list[str]]:
    """Treated parameters by the layer of the model that applies them first, in order.

    A layer is a block of the outermost stack of residual blocks that the module path lies in, or
    else of the outermost list of modules of which several are treated. Weights outside of all of
    these go by groups.
    """
    paths: dict[str, str] = {}
    for group in sites.groups:
        for site in group.sites:
            paths.setdefault(site.parameter, site.path or site.parameter)
    indices: dict[str, set[int]] = {}
    for path in paths.values():
        for stack, index in positions(path):
            indices.setdefault(stack, set()).add(index)
    residual = program.stacks()
    layers: dict[object, list[str]] = {}
    for group in sites.groups:
        for name in group.parameters:
            places = [p for p in positions(paths[name]) if len(indices[p[0]]) > 1]
            inside = [p for p in places if p[0] in residual] or places
            layers.setdefault(inside[0] if inside else group.index, []).append(name)
    return list(layers.values())


@dataclass
class Watching:
    """A treatment that looks at each group's statistics and changes nothing."""

    kind: type[Norms] | type[SecondMoment]
    look: Callable[[Group, list[Statistic | None], Mapping[str, Tensor]], None]
    even: bool = False

    def observer(self, group: Group, part: int) -> Collector:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""
        made = _Even if self.even else Collector
        return made(self.kind, f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Show the weights of a group to `look`; none changes."""
        self.look(group, collected(observers), weights)
        return ()


class _Even(Collector):
    """A collector of rows that are scaled to a root mean square of 1."""

    def add(self, x: Tensor) -> None:
        """Scale the rows, and count them."""
        size = x.square().mean(1, keepdim=True).sqrt()
        super().add(x / torch.where(size > 0, size, 1))


@dataclass
class _Scores:
    """Wanda's scores of some weights, made anew whenever they are gone through; one at a time."""

    program: BaseProgram
    sites: Sites
    names: Sequence[str]
    norms: Mapping[str, Sequence[Statistic | None]]

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.names:
            layout = next(g for g in self.sites.groups if name in g.parameters).layout(name)
            weight = self.program.weights[name].detach()
            _check_finite(name, weight)
            for matrix, seen in zip(layout.matrices(weight), self.norms[name], strict=True):
                if seen is not None and not seen.silent:
                    yield wanda_scores(matrix, seen)
            page_out(weight)

    def __bool__(self) -> bool:
        return any(s is not None and not s.silent for n in self.names for s in self.norms[n])


def _of_parts(sites: Sites, dealt: Mapping[str, float]) -> Shares:
    return {n: [dealt[n]] * g.parts for g in sites.groups for n in g.parameters}


def _size(program: BaseProgram, names: Iterable[str]) -> int:
    return sum(torch.Size(program.parameters[name]).numel() for name in names)


def _norms(seen: Moments) -> Norms:
    """What norms would have been collected of the same rows."""
    found = Norms(seen.features, seen.device)
    found.sums, found.tokens = seen.sums, seen.tokens
    found.squares = seen.products.diagonal().double()
    return found


def _energy(rows: Tensor, hessian: Tensor) -> float:
    """tr(x H xᵀ)."""
    with exact():
        return max(float((rows @ hessian).mul_(rows).sum(dtype=torch.float64)), 0.0)


def _check_finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise CalibrationError(f"{bad} of {weight.numel()} weights are NaN or infinite", where=name)
