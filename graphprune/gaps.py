"""What a streamed run shows of a weight: what it reads, and what its output lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphprune.solvers import SecondMoment
from graphprune.solvers.gap import GapClosing, Sample
from graphprune.streaming import Group


@dataclass(eq=False)
class Sums:
    """The second moment of what a part reads, and of the gaps of its weights."""

    moment: SecondMoment | None = None
    products: dict[str, Tensor] = field(default_factory=dict)
    gaps: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)

    def add(self, x: Tensor, where: str) -> None:
        """Count rows."""
        if self.moment is None:
            self.moment = SecondMoment(x.shape[-1], x.device)
        self.moment.add(x, where)

    def add_gap(self, parameter: str, x: Tensor, missing: Tensor) -> None:
        """Count the gaps of these rows."""
        if parameter not in self.gaps:
            self.products[parameter] = x.new_zeros(missing.shape[1], x.shape[1])
            self.gaps[parameter] = x.new_zeros(missing.shape[1], dtype=torch.float64)
            self.squares[parameter] = 0.0
        self.products[parameter].addmm_(missing.T, x)
        self.gaps[parameter] += missing.sum(0, dtype=torch.float64)
        self.squares[parameter] += float(missing.square().sum(dtype=torch.float64))

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        if self.moment is None or other.moment is None:
            return other if self.moment is None else self
        total = Sums(SecondMoment(self.moment.features, self.moment.device))
        assert total.moment is not None
        total.moment.merge(self.moment)
        total.moment.merge(other.moment)
        for name in self.gaps:
            total.products[name] = self.products[name] + other.products[name]
            total.gaps[name] = self.gaps[name] + other.gaps[name]
            total.squares[name] = self.squares[name] + other.squares[name]
        return total


@dataclass(eq=False)
class Gathered:
    """What a part of a group has seen, in two halves where the dense model runs along.

    Attributes:
        where: the group and the part, for messages.
        halves: samples go to them in turns.
        streams: whether only gaps of residual streams are of interest.
    """

    where: str
    halves: tuple[Sums, ...]
    streams: bool = False
    turn: int = 0

    def add(self, x: Tensor) -> None:
        """See `graphprune.streaming.Observer`."""
        self.turn += 1
        self.halves[self.turn % len(self.halves)].add(x, self.where)

    def wants_gap(self, parameter: str, in_stream: bool) -> bool:
        """See `graphprune.streaming.run.GapObserver`."""
        return len(self.halves) > 1 and (in_stream or not self.streams)

    def gap(self, parameter: str, x: Tensor, missing: Tensor) -> None:
        """See `graphprune.streaming.run.GapObserver`."""
        self.halves[self.turn % len(self.halves)].add_gap(parameter, x, missing)

    @property
    def moment(self) -> SecondMoment | None:
        """Of all samples; None where there were none."""
        sums = self.halves[0] if len(self.halves) == 1 else self.halves[0].plus(self.halves[1])
        return sums.moment

    def fits(self, parameter: str, features: int, centred: bool) -> tuple[Fit, ...]:
        """What a weight is fitted to: on all samples, then on each half if there are two."""
        sums = self.halves
        if len(sums) == 2:
            sums = (sums[0].plus(sums[1]), *sums)
        return tuple(Fit.of(one, parameter, features, centred) for one in sums)


@dataclass(frozen=True, eq=False)
class Fit:
    """Statistics of one part of a weight.

    Attributes:
        moment: of what it reads; about the mean where a bias makes up for that.
        mean: [in], of what it reads.
        cross: [out, in], E[g xᵀ] of the gap g, float64, likewise about the mean; None without one.
        gap: [out], mean of the gap; None without a gap.
        square: E|g|² likewise.
    """

    moment: SecondMoment
    mean: Tensor
    cross: Tensor | None = None
    gap: Tensor | None = None
    square: float = 0.0

    @classmethod
    def of(cls, sums: Sums, parameter: str, features: int, centred: bool) -> Fit:
        """The statistics of a weight, about the mean if `centred`."""
        moment = sums.moment or SecondMoment(features)
        shown = moment.centred() if centred else moment
        if parameter not in sums.gaps:
            return cls(shown, moment.means)
        tokens = max(moment.tokens, 1)
        cross = sums.products[parameter].double() / tokens
        gap = sums.gaps[parameter] / tokens
        square = sums.squares[parameter] / tokens
        if centred:
            cross -= torch.outer(gap, moment.means)
            square -= float(gap.square().sum())
        return cls(shown, moment.means, cross, gap, square)

    def shift(self, old: Tensor, new: Tensor) -> Tensor:
        """[out], float64: what a bias has to add."""
        change = (old.double() - new.double()) @ self.mean
        return change if self.gap is None else change + self.gap

    def error(self, old: Tensor, new: Tensor) -> float:
        """E|old x + g - new x|² / E|old x + g|²: the relative error of an output."""
        hessian = self.moment.hessian.double()
        change = new.double() - old.double()
        lost = float(((change @ hessian) * change).sum()) + self.square
        energy = float(((old.double() @ hessian) * old.double()).sum()) + self.square
        if self.cross is not None:
            lost -= 2 * float((change * self.cross).sum())
            energy += 2 * float((old.double() * self.cross).sum())
        return max(lost, 0.0) / energy if energy > 0 else 0.0

    def sample(self) -> Sample:
        """It as `GapClosing` takes it."""
        assert self.cross is not None
        return Sample(self.moment.tokens, self.moment.hessian.double(), self.cross)


def gathered(group: Group, part: int, halves: int, streams: bool = False) -> Gathered:
    """An observer of a part of a group."""
    return Gathered(f"{group.name}, part {part}", tuple(Sums() for _ in range(halves)), streams)


def closed(weight: Tensor, fits: Sequence[Fit], closing: GapClosing) -> Tensor:
    """A weight that also closes its gap, as far as one half of the samples tells of the other.

    Args:
        weight: [out, in], dense.
        fits: on all samples and on either half; see `Gathered.fits`.
        closing: how.

    Returns:
        [out, in], what a pruned weight should do as well as it can.
    """
    whole, *halves = fits
    if len(halves) < 2 or any(f.cross is None or f.moment.silent for f in fits):
        return weight
    every = torch.arange(weight.shape[1], device=weight.device)
    base = [torch.zeros_like(weight, dtype=torch.float64)] * 2
    change = closing.change([h.sample() for h in halves], base, whole.sample(), every)
    return (weight.double() + change).to(weight.dtype)
