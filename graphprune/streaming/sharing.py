"""How processes share a streamed run: whose samples, whose weights, and what they tell each other.

Each runs its own batches. The statistics of a group are added up where its weights are solved, and
what comes out is sent to all, so that everyone goes on with the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graphprune.calibration.batches import Batch
from graphprune.errors import CalibrationError
from graphprune.ranks.dealing import deal
from graphprune.ranks.group import Ranks
from graphprune.ranks.messages import Blank
from graphprune.streaming.core.observer import Additive, Observer
from graphprune.streaming.core.sites import Group
from graphprune.streaming.core.treatment import Recording, Separable, Treatment

Task: TypeAlias = tuple[str, int]
"""A parameter and a part of it."""

Seen: TypeAlias = list[tuple[int, dict[str, Blank]]]
"""Of each part of a group: the rows that a process has seen, and the sums that it has."""


def own_batches(ranks: Ranks, batches: Sequence[Batch]) -> list[int]:
    """The numbers of this process's batches, ascending; larger ones are dealt first."""
    return ranks.share([sum(map(_size, batch.leaves())) for batch in batches])


def _size(leaf: Any) -> int:
    return leaf.numel() if isinstance(leaf, Tensor) else 0


@dataclass(frozen=True)
class Work:
    """The weights of one group, and who solves what.

    Attributes:
        ranks: the processes.
        treatment: what is done.
        group: the group.
        owners: of every part of every parameter, the process that solves it.
    """

    ranks: Ranks
    treatment: Treatment | Separable
    group: Group
    owners: Mapping[Task, int]

    @classmethod
    def dealt(
        cls,
        ranks: Ranks,
        treatment: Treatment | Separable,
        group: Group,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Work:
        """Deal the parts of a group's weights by what it costs to solve them.

        Args:
            ranks: the processes.
            treatment: what is done; one that isn't separable has one owner for all.
            group: the group.
            shapes: of the parameters.
        """
        tasks, costs = [], []
        for name in group.parameters:
            weight = torch.empty(shapes[name], device="meta")
            parts, outputs, inputs = group.layout(name).matrices(weight).shape
            tasks += [(name, part) for part in range(parts)]
            costs += [float(inputs) ** 2 * (inputs + outputs)] * parts  # a factor, and its use
        if isinstance(treatment, Separable):
            return cls(
                ranks, treatment, group, dict(zip(tasks, deal(costs, ranks.world), strict=True))
            )
        # Nobody can begin with a group before the one before it is done: turns spread the memory.
        return cls(ranks, treatment, group, dict.fromkeys(tasks, group.index % ranks.world))

    @property
    def owner(self) -> int:
        """The process that solves all, where one does."""
        return next(iter(self.owners.values()))

    def needs(self, part: int) -> frozenset[int]:
        """The processes that need the statistic of a part."""
        if isinstance(self.treatment, Separable | Recording):
            return frozenset(owner for (_, p), owner in self.owners.items() if p == part)
        return frozenset(range(self.ranks.world))

    def add_up(self, observers: Sequence[Observer], seen: Sequence[Seen]) -> None:
        """Bring statistics together where they are needed.

        What is sent follows from what all processes have seen, not from what this one has: no
        token of its samples may have come to some expert.

        Args:
            observers: of each part, with what this process has seen.
            seen: of every process, the same list on each of them.
        """
        for part, observer in enumerate(observers):
            holders = [rank for rank, own in enumerate(seen) if own[part][1]]
            needs = self.needs(part)
            if not holders or (len(holders) == 1 and needs == {holders[0]}):
                continue
            blanks = {n: blank for rank in holders for n, blank in seen[rank][part][1].items()}
            own = observer.totals() if isinstance(observer, Additive) else {}
            owner = next(iter(needs)) if len(needs) == 1 else None
            totals = {}
            for name in sorted(blanks):
                mine = own.pop(name, None)
                totals[name] = self.ranks.add(blanks[name].zeros() if mine is None else mine, owner)
            if self.ranks.rank in needs and isinstance(observer, Additive):
                observer.take(totals)

    def solve(
        self, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The new weights of the group, on every process."""
        if isinstance(self.treatment, Separable):
            yield from self._solved_apart(self.treatment, observers, weights)
        elif isinstance(self.treatment, Recording):
            yield from self._solved_by_one(self.treatment, observers, weights)
        else:
            yield from self.treatment.treat(self.group, observers, weights)

    def _solved_apart(
        self,
        treatment: Separable,
        observers: Sequence[Observer],
        weights: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        group, ranks = self.group, self.ranks
        done: dict[Task, Any] = {}

        def work() -> None:
            for name in group.parameters:
                own = [
                    p for (n, p), owner in self.owners.items() if (n, owner) == (name, ranks.rank)
                ]
                matrices = group.layout(name).matrices(weights[name]) if own else ()
                for part in own:
                    observer = observers[part]
                    done[name, part] = treatment.solve(group, name, part, matrices[part], observer)

        ranks.agree(work)
        for name in group.parameters:
            solved = [
                ranks.broadcast(owner, done.pop((n, part), None))
                for (n, part), owner in self.owners.items()
                if n == name
            ]
            yield name, treatment.assemble(group, name, weights[name], solved)

    def _solved_by_one(
        self,
        treatment: Treatment,
        observers: Sequence[Observer],
        weights: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        group, ranks = self.group, self.ranks

        def work() -> Iterable[tuple[str, Tensor]]:
            yield from treatment.treat(group, observers, weights)

        yield from ranks.relay(self.owner, work)
        assert isinstance(treatment, Recording)
        own = ranks.rank == self.owner
        record = ranks.broadcast(self.owner, json.dumps(treatment.record(group)) if own else None)
        if not own:
            treatment.recall(group, json.loads(record))


def look(ranks: Ranks, group: Group, observers: Sequence[Observer], tokens: Sequence[int]) -> Seen:
    """What this process has seen of a group.

    Raises:
        CalibrationError: its statistics can't be added to those of other processes.
    """
    if ranks.world > 1 and not all(isinstance(one, Additive) for one in observers):
        kind = type(next(one for one in observers if not isinstance(one, Additive))).__name__
        raise CalibrationError(
            "a statistic can't be added up over several processes",
            where=group.name,
            why=f"{kind} has no methods totals and take",
            hint="give it these (see graphprune.streaming.Additive), or run one process",
        )
    return [
        (count, _blanks(one) if ranks.world > 1 else {})
        for one, count in zip(observers, tokens, strict=True)
    ]


def _blanks(observer: Observer) -> dict[str, Blank]:
    assert isinstance(observer, Additive)
    return {name: Blank.of(one) for name, one in observer.totals().items()}
