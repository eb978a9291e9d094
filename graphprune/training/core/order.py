"""Which samples each step sees: a function of the seed and the step alone, with nothing to save."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
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
    """

    count: int
    total: int
    batch: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps, a last one that isn't full included."""
        return -(-self.total // self.batch)

    def samples(self, step: int) -> list[int]:
        """Numbers of the samples of a step."""
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
