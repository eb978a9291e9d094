"""Levers: how far structures shrink together, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graphprune.axes.expr import IntArray
from graphprune.passes.selection.rank import Ranked
from graphprune.passes.selection.scope import Candidate
from graphprune.plan.units import FloatArray

Counts = dict[str, int]


def round_half_up(x: float) -> int:
    """`x` to the nearest integer; the tolerance is for fractions such as 0.29 * 50."""
    return math.floor(x + 0.5 + 1e-9)


class Lever(Protocol):
    """Some structures whose kept counts fall as k rises from 0 to `steps`."""

    @property
    def steps(self) -> int:
        """The last k."""

    def at(self, k: int) -> Counts:
        """Kept units per structure after k steps."""

    @property
    def removable(self) -> int:
        """How many units may go, whatever has to stay of each structure."""

    def wanted(self, fraction: float) -> int:
        """The number of units that a fraction is."""

    def nearest(self, fraction: float) -> int:
        """The k whose number of removed units is nearest to a fraction; of two, the larger k."""


@dataclass(frozen=True, slots=True, eq=False)
class UniformLever:
    """Structures of equal size that keep equal counts."""

    candidates: tuple[Candidate, ...]

    @property
    def steps(self) -> int:
        """Number of rungs below the whole."""
        return len(self.candidates[0].ladder) - 1

    def at(self, k: int) -> Counts:
        """Kept units per structure after k steps."""
        kept = int(self.candidates[0].ladder[k])
        return {c.structure.name: kept for c in self.candidates}

    @property
    def removable(self) -> int:
        """How many units of each structure may go."""
        return len(self.candidates[0].removable)

    def wanted(self, fraction: float) -> int:
        """The number of units of each structure that a fraction is."""
        return round_half_up(fraction * self.candidates[0].units)

    def nearest(self, fraction: float) -> int:
        """The rung nearest to a fraction of the units."""
        first = self.candidates[0]
        return _nearest(first.structure.size - first.ladder, self.wanted(fraction))


@dataclass(frozen=True, slots=True, eq=False)
class GlobalLever:
    """Structures whose units go in the order of their scores over all of them.

    Attributes:
        candidates: the structures, no one below its own floor.
        sequence: ``[steps]``: which of the candidates goes down a rung at each step.
        removed: ``[steps + 1]``: units removed after so many steps, ascending.
    """

    candidates: tuple[Candidate, ...]
    sequence: IntArray
    removed: IntArray

    @classmethod
    def of(cls, candidates: Sequence[Candidate], ranked: Mapping[str, Ranked]) -> GlobalLever:
        """Merge the ladders of `candidates` by price, the cheapest step first.

        A rung's price is the mean score of the units between it and the one above, so that
        alignment doesn't change what a unit is worth.
        """
        prices, owner, units = [], [], []
        for i, candidate in enumerate(candidates):
            rungs = candidate.structure.size - candidate.ladder
            price = ranked[candidate.structure.name].price
            prices.append(_rung_prices(price, rungs))
            units.append(np.diff(rungs))
            owner.append(np.full(len(rungs) - 1, i, dtype=np.int64))
        sequence = np.argsort(np.concatenate(prices), kind="stable")
        removed = np.cumsum(np.concatenate([[0], np.concatenate(units)[sequence]]))
        return cls(tuple(candidates), np.concatenate(owner)[sequence], removed.astype(np.int64))

    @property
    def steps(self) -> int:
        """Number of rungs below the whole, over all structures."""
        return len(self.sequence)

    def at(self, k: int) -> Counts:
        """Kept units per structure after k steps."""
        rungs = np.bincount(self.sequence[:k], minlength=len(self.candidates))
        pairs = zip(self.candidates, rungs, strict=True)
        return {c.structure.name: int(c.ladder[rung]) for c, rung in pairs}

    @property
    def removable(self) -> int:
        """How many units of all structures together may go."""
        return sum(len(c.removable) for c in self.candidates)

    def wanted(self, fraction: float) -> int:
        """The number of units that a fraction of all structures together is."""
        return round_half_up(fraction * sum(c.units for c in self.candidates))

    def nearest(self, fraction: float) -> int:
        """The step nearest to a fraction of all units together."""
        return _nearest(self.removed, self.wanted(fraction))


def levers(
    candidates: Sequence[Candidate], *, uniform: bool, ranked: Mapping[str, Ranked]
) -> list[Lever]:
    """The levers of one role.

    Args:
        candidates: its structures.
        uniform: True makes a lever of all structures of one size; False one of all.
        ranked: needed where `uniform` is False.
    """
    if not uniform:
        return [GlobalLever.of(candidates, ranked)]
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        key = (len(candidate.removable), candidate.units, *candidate.ladder.tolist())
        groups.setdefault(key, []).append(candidate)
    return [UniformLever(tuple(group)) for group in groups.values()]


def _rung_prices(price: FloatArray, rungs: IntArray) -> FloatArray:
    if len(rungs) == 1:
        return np.zeros(0)
    total = np.add.reduceat(price[: rungs[-1]], rungs[:-1])
    return np.asarray(total / np.diff(rungs), dtype=np.float64)


def _nearest(removed: IntArray, wanted: int) -> int:
    """Position of the entry of ascending `removed` nearest to `wanted`; of two, the later."""
    above = min(int(np.searchsorted(removed, wanted)), len(removed) - 1)
    below = max(above - 1, 0)
    return below if wanted - removed[below] < removed[above] - wanted else above
