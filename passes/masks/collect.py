"""What a streamed run shows of a value, collected for solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

from torch import Tensor

from graphprune.solvers import Norms, SecondMoment, Statistic
from graphprune.streaming import Observer

Some = TypeVar("Some", bound=Statistic)


@dataclass
class Collector:
    """An observer with a statistic, which learns its width from the first rows.

    Attributes:
        kind: of the statistic.
        where: the group and the part, for messages.
        errors: whether errors are to be told, too: of lighter statistics they don't follow.
        statistic: None until rows come.
        moment: what errors are computed from; None where they aren't to be told, or as yet.
        checks: see `graphprune.streaming.core.observer.Checking`.
    """

    checks: ClassVar[bool] = True

    kind: type[Norms] | type[SecondMoment]
    where: str
    errors: bool = False
    statistic: Norms | SecondMoment | None = None
    moment: SecondMoment | None = None

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""
        if self.statistic is None:
            self.statistic = self.kind(x.shape[-1], x.device)
            if self.errors and isinstance(self.statistic, Norms):
                self.moment = SecondMoment(x.shape[-1], x.device)
        self.statistic.add(x, self.where)
        if self.moment is not None:
            self.moment.add(x, self.where)

    def totals(self) -> dict[str, Tensor]:
        """What processes add up; see `graphprune.streaming.Additive`."""
        kinds = {"statistic": self.statistic, "moment": self.moment}
        return {
            f"{kind}.{name}": one
            for kind, statistic in kinds.items()
            if statistic is not None
            for name, one in statistic.totals().items()
        }

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""
        self.statistic = summed(self.kind, totals, "statistic.")
        if any(name.startswith("moment.") for name in totals):
            self.moment = summed(SecondMoment, totals, "moment.")


def summed(kind: type[Some], totals: Mapping[str, Tensor], prefix: str) -> Some:
    """A statistic of sums, by their names after a prefix."""
    own = {n.removeprefix(prefix): one for n, one in totals.items() if n.startswith(prefix)}
    first = next(one for one in own.values() if one.dim())
    statistic = kind(first.shape[-1], first.device)
    statistic.take(own)
    return statistic


def collected(observers: Sequence[Observer]) -> list[Statistic | None]:
    """The statistics of collectors; None for a part that has seen no token."""
    return [cast("Collector", one).statistic for one in observers]
