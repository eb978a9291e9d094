"""What a streamed run shows of a weight: what it reads, and what its output lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.placement import present
from graphprune.solvers import Moments, SecondMoment
from graphprune.solvers.gap import GapClosing, Sample
from graphprune.solvers.statistic import add_lower, mirrored
from graphprune.streaming import Group


@dataclass(eq=False)
class GapSums:
    """Sums over tokens of what a weight reads and of its gap, each token with its weight.

    All are in float64, in which the order of samples makes no difference.

    Attributes:
        inputs: [in, in], sum of w x xᵀ of what it reads, of which only the lower triangle counts.
        means: [in], sum of w x.
        products: [out, in], sum of w g xᵀ.
        gaps: [out], sum of w g.
        scalars: [2], sums of w |g|² and of w.
    """

    inputs: Tensor
    means: Tensor
    products: Tensor
    gaps: Tensor
    scalars: Tensor

    @classmethod
    def zero(cls, x: Tensor, missing: Tensor) -> GapSums:
        """Nothing yet, for rows like these."""
        width, outputs = x.shape[1], missing.shape[1]
        sizes = ((width, width), (width,), (outputs, width), (outputs,), (2,))
        return cls(*(x.new_zeros(size, dtype=torch.float64) for size in sizes))

    def add(self, x: Tensor, missing: Tensor, stream: Tensor | None) -> None:
        """Count rows; see `weights`."""
        counts = x.new_ones(len(x), 1) if stream is None else weights(stream)
        heavy = x * counts
        add_lower(self.inputs, heavy, x)
        self.means += heavy.sum(0, dtype=torch.float64)
        self.products += missing.T @ heavy
        self.gaps += (missing * counts).sum(0, dtype=torch.float64)
        self.scalars[0] += (missing.square() * counts).sum(dtype=torch.float64)
        self.scalars[1] += counts.sum(dtype=torch.float64)

    def plus(self, other: GapSums) -> GapSums:
        """Both together."""
        ours, theirs = self.totals(), other.totals()
        return GapSums(**{name: ours[name] + theirs[name] for name in ours})

    def totals(self) -> dict[str, Tensor]:
        """What processes add up, by name."""
        return dict(vars(self))


def weights(stream: Tensor) -> Tensor:
    """How much tokens count: one over the size of their residual stream.

    A few tokens have streams hundreds of times as large as the rest (massive activations; every
    later token attends to them). Least squares of absolute errors would see nothing else, and of
    relative errors would leave them to chance.

    Args:
        stream: [tokens, channels], dense.

    Returns:
        [tokens, 1]; 0 where the stream is zero.
    """
    size = stream.square().mean(1, keepdim=True).sqrt()
    return torch.where(size > 0, 1 / size, 0)


@dataclass(eq=False)
class Sums:
    """The second moment of what a part reads, and of the gaps of its weights."""

    moment: Moments | None = None
    gaps: dict[str, GapSums] = field(default_factory=dict)

    def add(self, x: Tensor, where: str) -> None:
        """Count rows."""
        if self.moment is None:
            self.moment = Moments(x.shape[-1], x.device)
        self.moment.add(x, where)

    def add_gap(self, parameter: str, x: Tensor, missing: Tensor, stream: Tensor | None) -> None:
        """Count the gaps of these rows."""
        if parameter not in self.gaps:
            self.gaps[parameter] = GapSums.zero(x, missing)
        self.gaps[parameter].add(x, missing, stream)

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        if self.moment is None or other.moment is None:
            return other if self.moment is None else self
        total = Sums(Moments(self.moment.features, self.moment.device))
        assert total.moment is not None
        total.moment.merge(self.moment)
        total.moment.merge(other.moment)
        total.gaps = {name: one.plus(other.gaps[name]) for name, one in self.gaps.items()}
        return total

    def totals(self) -> dict[str, Tensor]:
        """What processes add up, by name."""
        if self.moment is None:
            return {}
        found = {f"moment.{name}": one for name, one in self.moment.totals().items()}
        for parameter, sums in self.gaps.items():
            found |= {f"gap.{name}.{parameter}": one for name, one in sums.totals().items()}
        return found

    @classmethod
    def of(cls, totals: Mapping[str, Tensor]) -> Sums:
        """From what `totals` gives."""
        if not totals:
            return cls()
        own: dict[str, Tensor] = {}
        gaps: dict[str, dict[str, Tensor]] = {}
        for key, one in totals.items():
            kind, name, *rest = key.split(".", 2)
            if kind == "moment":
                own[name] = one
            else:
                gaps.setdefault(rest[0], {})[name] = one
        moment = Moments(len(own["sums"]), own["sums"].device)
        moment.take(own)
        return cls(moment, {name: GapSums(**sums) for name, sums in gaps.items()})


@dataclass(eq=False)
class Gathered:
    """What a part of a group has seen, in two halves where the dense model runs along.

    Attributes:
        where: the group and the part, for messages.
        halves: batches go to them in turns.
        streams: whether only gaps of residual streams are of interest.
        turn: number of the present batch.
        checks: see `graphprune.streaming.core.observer.Checking`.
    """

    checks: ClassVar[bool] = True

    where: str
    halves: tuple[Sums, ...]
    streams: bool = False
    turn: int = 0

    def begin(self, batch: int) -> None:
        """What comes next is of this batch."""
        self.turn = batch + 1

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""
        self.halves[self.turn % len(self.halves)].add(x, self.where)

    def wants_gap(self, parameter: str, in_stream: bool) -> bool:
        """Whether `gap` is to be called for a weight: two products for each of its inputs."""
        return len(self.halves) > 1 and (in_stream or not self.streams)

    def gap(self, parameter: str, x: Tensor, missing: Tensor, stream: Tensor | None) -> None:
        """See what a weight's output lacks."""
        self.halves[self.turn % len(self.halves)].add_gap(parameter, x, missing, stream)

    def totals(self) -> dict[str, Tensor]:
        """What processes add up; see `graphprune.streaming.core.observer.Additive`."""
        halves = enumerate(self.halves)
        return {f"{n}.{key}": one for n, half in halves for key, one in half.totals().items()}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""
        own: list[dict[str, Tensor]] = [{} for _ in self.halves]
        for key, one in totals.items():
            half, _, name = key.partition(".")
            own[int(half)][name] = one
        self.halves = tuple(map(Sums.of, own))

    @property
    def moment(self) -> Moments | None:
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
class Gap:
    """The gap of a weight's output, and what it reads: means over tokens with their weights.

    Attributes:
        hessian: [in, in], float64, E[x xᵀ]; about the mean where a bias makes up for that.
        mean: [in], E[x].
        cross: [out, in], float64, E[g xᵀ] of the gap g, likewise about the mean.
        gap: [out], E[g].
        square: E|g|² likewise.
    """

    hessian: Tensor
    mean: Tensor
    cross: Tensor
    gap: Tensor
    square: float

    @classmethod
    def of(cls, sums: GapSums, centred: bool) -> Gap:
        """From sums, about the mean if `centred`."""
        square, total = sums.scalars.tolist()
        total = total or 1.0
        mean, gap = sums.means / total, sums.gaps / total
        hessian = mirrored(sums.inputs).div_(total)
        cross = sums.products / total
        square /= total
        if centred:
            hessian -= torch.outer(mean, mean)
            hessian.diagonal().clamp_(min=0)
            cross -= torch.outer(gap, mean)
            square -= float(gap.square().sum())
        return cls(hessian, mean, cross, gap, square)


@dataclass(frozen=True, eq=False)
class Fit:
    """Statistics of one part of a weight.

    Attributes:
        moment: of what it reads; about the mean where a bias makes up for that.
        mean: [in], of what it reads.
        gap: of its output; None where nobody has looked.
    """

    moment: SecondMoment
    mean: Tensor
    gap: Gap | None = None

    @classmethod
    def of(cls, sums: Sums, parameter: str, features: int, centred: bool) -> Fit:
        """The statistics of a weight, about the mean if `centred`."""
        moment = sums.moment or Moments(features, present().device)
        shown = moment.centred() if centred else moment
        known = sums.gaps.get(parameter)
        return cls(shown, moment.means, None if known is None else Gap.of(known, centred))

    def shift(self, old: Tensor, new: Tensor) -> Tensor:
        """[out], float64: what a bias has to add."""
        change = old.double() - new.double()
        if self.gap is None:
            return change @ self.mean
        return change @ self.gap.mean + self.gap.gap

    def errors(self, old: Tensor, *new: Tensor) -> list[float]:
        """E|old x + g - new x|² / E|old x + g|² for each: the relative error of an output."""
        gap, wide = self.gap, old.double()
        hessian = self.moment.hessian.double() if gap is None else gap.hessian
        missing = 0.0 if gap is None else gap.square

        def square(change: Tensor) -> float:
            total = float(((change @ hessian) * change).sum()) + missing
            return total if gap is None else total + 2 * float((change * gap.cross).sum())

        energy = square(wide)
        lost = (max(square(wide - one.double()), 0.0) for one in new)
        return [one / energy if energy > 0 else 0.0 for one in lost]

    def sample(self) -> Sample:
        """It as `GapClosing` takes it."""
        assert self.gap is not None
        return Sample(self.moment.tokens, self.gap.hessian, self.gap.cross)


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
    if len(halves) < 2 or any(f.gap is None or f.moment.silent for f in fits):
        return weight
    every = torch.arange(weight.shape[1], device=weight.device)
    base = [torch.zeros_like(weight, dtype=torch.float64)] * 2
    change = closing.change([h.sample() for h in halves], base, whole.sample(), every)
    return (weight.double() + change).to(weight.dtype)
