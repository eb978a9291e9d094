"""What scores of activations share: statistics of what the consumers of a structure read.

A consumer is a weight that multiplies by values which run along a structure's axis; see
`graphprune.streaming.consumers`. Each of its columns belongs to one unit. One pass over the
calibration data through the dense model gives all statistics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.shared.reduce import marginals
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import NONE, FloatArray
from graphprune.streaming import Group, Observer, batches, find_sites, stream

if TYPE_CHECKING:
    from graphprune.streaming.consumers import Consumer


class Statistic(Protocol):
    """Accumulates a statistic of every column, batch by batch."""

    def add(self, x: Tensor, where: str = "") -> None:
        """Count rows ``[tokens, columns]``, all of one batch; `where` is for messages."""

    def totals(self) -> dict[str, Tensor]:
        """What processes that share the samples add up, by name: tensors of so many columns."""

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""


S = TypeVar("S", bound=Statistic)

Weigh = Callable[[Tensor, FloatArray], FloatArray]
"""From a matrix ``[out, columns]`` and the statistic of its columns to a value for each column."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one consumer has for the units of a structure.

    Attributes:
        consumer: the weight that reads the units.
        values: float64 ``[parts, columns]``.
        structure: the structure.
    """

    consumer: Consumer
    values: FloatArray
    structure: Structure

    def per_unit(self, values: FloatArray | None = None) -> FloatArray:
        """Sum of the columns of each unit.

        Args:
            values: ``[parts, columns]``; None for its own.

        Returns:
            ``[size]``, or ``[outer size, size]`` where the structure is ragged.
        """
        outer = self.structure.within
        count = self.structure.size * (outer.size if outer is not None else 1)
        owned = self.owned
        total = np.bincount(
            self.consumer.units[owned],
            weights=(self.values if values is None else values)[owned],
            minlength=count,
        )
        shape = (outer.size, -1) if outer is not None else (-1,)
        return np.asarray(total, dtype=np.float64).reshape(shape)

    @property
    def owned(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Bool ``[parts, columns]``: the columns that belong to a unit."""
        return np.asarray(self.consumer.units != NONE)


def read(
    program: BaseProgram,
    structures: Sequence[Structure],
    inputs: Inputs,
    score: str,
    statistic: Callable[[int], S],
    columns: Callable[[S], Tensor],
    weigh: Weigh | None = None,
) -> dict[str, list[Reading]]:
    """Show every consumer's inputs in the dense model to a statistic.

    Args:
        program: the program.
        structures: to be scored.
        inputs: their calibration data is what `graphprune.streaming.batches` takes; samples go
            through one by one.
        score: its name, for messages.
        statistic: makes a statistic of so many columns, for each part of each value that is read.
        columns: what counts of it, ``[columns]``, ``>= 0``.
        weigh: joins that with a consumer's weights. None takes it alone; consumers that read one
            value then say the same, and only the first of them is reported.

    Returns:
        Structure name to readings, in the order of the graph.

    Raises:
        PlanError: there is no calibration data, or a structure has no consumers.
    """
    from graphprune.streaming.consumers import consumers

    for s in structures:
        if s.blocks:
            raise PlanError(
                f"score {score} is about what reads the units of an axis, and this is a stack of "
                "layers",
                where=s.name,
                hint="use score block-influence for layers",
            )
    if inputs.calibration is None:
        raise PlanError(
            f"score {score} needs calibration data",
            hint="pass calibration=: token windows [windows, length], or samples as for "
            "graphprune.streaming.batches",
        )
    if not structures:
        return {}
    everything = find_sites(program, every=True)
    found = consumers(program, structures, everything)
    for s in structures:
        if not found[s.name]:
            raise PlanError(
                f"score {score} can't see what units do that no weight multiplies by",
                where=s.name,
                why="they meet in a product of activations, or what reads them can't be treated",
                hint="leave them whole, or use score taylor or magnitude",
            )
    names = dict.fromkeys(c.parameter for cs in found.values() for c in cs)
    sites = find_sites(program, include=list(names), every=True)
    users = consumers(program, structures, sites)
    own = {s.name: s for s in structures}
    reader = _Reader(program, own, users, statistic, columns, weigh, f"score {score}")
    stream(program, sites, batches(program, inputs.calibration, batch=1), reader)
    return reader.found


@dataclass(eq=False)
class _Watch(Generic[S]):
    """An observer with a statistic, which is made when the first rows come."""

    make: Callable[[int], S]
    where: str
    statistic: S | None = None

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""
        if self.statistic is None:
            self.statistic = self.make(x.shape[-1])
        self.statistic.add(x, self.where)

    def totals(self) -> dict[str, Tensor]:
        """What processes add up; see `graphprune.streaming.Additive`."""
        return {} if self.statistic is None else self.statistic.totals()

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""
        if self.statistic is None:
            self.statistic = self.make(max(one.shape[-1] for one in totals.values() if one.dim()))
        self.statistic.take(totals)


@dataclass(eq=False)
class _Reader(Generic[S]):
    """A treatment that leaves all weights as they are."""

    program: BaseProgram
    structures: Mapping[str, Structure]
    consumers: Mapping[str, Sequence[Consumer]]
    statistic: Callable[[int], S]
    columns: Callable[[S], Tensor]
    weigh: Weigh | None
    where: str
    found: dict[str, list[Reading]] = field(default_factory=dict)

    def observer(self, group: Group, part: int) -> _Watch[S]:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""
        return _Watch(self.statistic, f"{group.name}, part {part}")

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Keep what is asked of the consumers; no weight changes."""
        seen = self._seen(group, [cast("_Watch[S]", one).statistic for one in observers])
        for name, users in self.consumers.items():
            here = [c for c in users if c.group == group.index]
            for consumer in here if self.weigh is not None else here[:1]:
                values = self._weighed(group, consumer, seen, weights)
                reading = Reading(consumer, values, self.structures[name])
                self.found.setdefault(name, []).append(reading)
        return ()

    def _seen(self, group: Group, statistics: Sequence[S | None]) -> FloatArray:
        """What each part has read; what no token chose gets the mean over all others."""
        found = [None if one is None else self.columns(one).cpu().numpy() for one in statistics]
        known = [columns for columns in found if columns is not None]
        if len(known) < len(found):
            warnings.warn(
                f"{self.where}: no token of the calibration data reached {len(found) - len(known)} "
                f"of the {len(found)} parts of {group.name}; they are given the mean of the others",
                stacklevel=2,
            )
        usual = float(np.mean(known)) if known else 1.0
        width = (
            group.layout(group.name)
            .matrices(torch.empty(self.program.parameters[group.name], device="meta"))
            .shape[2]
        )
        return np.stack([np.full(width, usual) if c is None else c for c in found])

    def _weighed(
        self,
        group: Group,
        consumer: Consumer,
        seen: FloatArray,
        weights: Mapping[str, Tensor],
    ) -> FloatArray:
        if self.weigh is None:
            return seen
        matrices = group.layout(consumer.parameter).matrices(weights[consumer.parameter])
        pairs = zip(matrices, seen, strict=True)
        return np.stack([self.weigh(matrix, columns) for matrix, columns in pairs])


def column_sums(matrix: Tensor, salience: Callable[[Tensor], Tensor]) -> FloatArray:
    """Sum of an element-wise salience over the rows of a matrix, for each column, in float64."""
    return marginals((matrix,), salience, [1])[1]
