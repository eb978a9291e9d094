"""Which samples each step sees: a function of the seed and the step alone, with nothing to save."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Order:
    """The samples of every step of a run.

    Each pass over the data is in an order of its own, and steps go on from one pass to the next.

    Attributes:
        count: samples that there are.
        total: samples that the run sees, some of them several times.
        batch: samples of a step; the last step has what is left.
        seed: of the orders.
        first: steps of these that other runs have done before this one.
        last: the step that this run ends before; None for all.
    """

    count: int
    total: int
    batch: int
    seed: int
    first: int = 0
    last: int | None = None

    @property
    def whole(self) -> int:
        """Optimiser steps of all runs together, a last one that isn't full included."""
        return -(-self.total // self.batch)

    @property
    def steps(self) -> int:
        """Optimiser steps of this run."""
        return (self.whole if self.last is None else self.last) - self.first

    @property
    def seen(self) -> int:
        """Samples that this run sees, some of them several times."""
        return min((self.first + self.steps) * self.batch, self.total) - self.first * self.batch

    def part(self, begin: float, end: float) -> Order:
        """A run of some of its steps.

        Args:
            begin: share of all steps that is done before.
            end: share that is done afterwards.
        """
        return replace(self, first=round(begin * self.whole), last=round(end * self.whole))

    def samples(self, step: int) -> list[int]:
        """Numbers of the samples of a step of this run."""
        step += self.first
        places = range(step * self.batch, min((step + 1) * self.batch, self.total))
        return [permutation(self.count, self.seed, p // self.count)[p % self.count] for p in places]

    def share(self, step: int, rank: int, world: int, size: int | None) -> list[list[int]]:
        """The samples of one process, in micro-batches.

        Args:
            step: from 0.
            rank: of the process.
            world: number of processes; each has as many micro-batches, of which some may be empty.
            size: samples of a micro-batch at most; None for all.
        """
        samples = self.samples(step)
        most = -(-len(samples) // world)
        own = samples[rank * most : (rank + 1) * most]
        size = most if size is None else min(size, most)
        return [own[i : i + size] for i in range(0, most, size)]


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in one pass over them."""
    order: list[int] = torch.randperm(count, generator=generator("order", seed, epoch)).tolist()
    return order


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend on a key only, not on what was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
