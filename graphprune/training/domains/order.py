"""Which samples each step sees where every one is of a domain, in shares that may change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.training.core.order import Order, generator, permutation

Exhausted = Literal["repeat", "renormalise", "stop"]


@dataclass(frozen=True)
class DomainOrder(Order):
    """An order of samples of domains, which stand one after the other.

    What a step sees is a function of the seed, the step, the shares and of how many samples of each
    domain were seen before; the latter two are saved with a run.

    Attributes:
        names: of the domains.
        sizes: samples of each.
        shares: float64 ``[domains]``, changed in place.
        seen_of: int64 ``[domains]``, samples that were seen of each, changed in place.
        exhausted: what becomes of a domain that has no more samples: "repeat" begins it anew, in
            another order; "renormalise" goes on with the others; "stop" is an error.
    """

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    shares: Tensor = field(default_factory=lambda: torch.empty(0))
    seen_of: Tensor = field(default_factory=lambda: torch.empty(0))
    exhausted: Exhausted = "repeat"

    def samples(self, step: int) -> list[int]:
        """Numbers of the samples of a step of this run."""
        return [number for number, _ in self._drawn(step)]

    def advance(self, step: int) -> None:
        """Note that a step is taken."""
        for _, domain in self._drawn(step):
            self.seen_of[domain] += 1

    def _drawn(self, step: int) -> list[tuple[int, int]]:
        """The samples of a step, each with its domain."""
        place = self.first + step
        count = min(self.batch, self.total - place * self.batch)
        noise = generator("domains", self.seed, place)
        seen, found = self.seen_of.tolist(), []
        for u in torch.rand(count, generator=noise, dtype=torch.float64).tolist():
            domain = self._domain(u, seen, step)
            size = self.sizes[domain]
            order = permutation(size, self.seed, seen[domain] // size)
            number = sum(self.sizes[:domain]) + order[seen[domain] % size]
            found.append((number, domain))
            seen[domain] += 1
        return found

    def _domain(self, u: float, seen: list[int], step: int) -> int:
        """The domain that a number from 0 to 1 falls into."""
        shares = self.shares.tolist()
        over = [s >= n for s, n in zip(seen, self.sizes, strict=True)]
        if self.exhausted == "renormalise":
            shares = [0.0 if done else w for w, done in zip(shares, over, strict=True)]
        total = sum(shares)
        if not total:
            raise self._ended("all domains", step)
        left, last = u * total, 0
        for domain, share in enumerate(shares):
            if share:
                last = domain
                left -= share
                if left < 0:
                    break
        if self.exhausted == "stop" and over[last]:
            raise self._ended(f"domain {self.names[last]}", step)
        return last

    def _ended(self, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"there are no more samples of {what}",
            where=f"step {step + 1}",
            hint="give more data, train for fewer steps, or take exhausted: repeat",
        )
