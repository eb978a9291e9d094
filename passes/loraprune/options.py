"""What LoRAPrune removes, by what, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from graphprune.errors import RecipeError
from graphprune.training.schedule.options import GradualPruning

Estimate = Literal["adapters", "weight"]


@dataclass(frozen=True)
class Pruning:
    """What to remove in the course of a training, and when.

    Attributes:
        goal: remove, target or shape, as an argument of `graphprune.select`.
        exclude: see `graphprune.select`; so are the next four.
        include: structures that may be pruned.
        uniform: whether every structure of a role loses as much.
        align: what kept sizes are multiples of.
        minimum: units that stay in every structure.
        normalize: what the scores of a structure are divided by where `uniform` is off.
        gradient: "adapters" estimates the gradient of a weight by those of its adapter, as in the
            paper; "weight" takes it as it is.
        average: share of the old scores in those after a step.
        initial: share of the steps before anything goes.
        final: share of the steps that train what is left in the end.
        every: steps between two prunings; None for 10, or fewer where there would not be 8 of them.
        seed: of the check before the first step.
    """

    goal: Mapping[str, Any]
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    uniform: bool = True
    align: int | str | Mapping[str, int | str] = 1
    minimum: int | float = 1
    normalize: str = "mean"
    gradient: Estimate = "adapters"
    average: float = 0.9
    initial: float = 0.1
    final: float = 0.1
    every: int | None = None
    seed: int = 0
    schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RecipeError: one is out of its range, or they contradict each other.
        """
        if not 0 <= self.average < 1:
            raise RecipeError(
                f"pruning option 'average': {self.average!r} is no share below 1",
                hint="0.9 is what LoRAPrune takes",
            )
        object.__setattr__(self, "schedule", Schedule(self.initial, self.final, self.every))

    def identity(self) -> dict[str, Any]:
        """The options as plain data."""
        names = [n for n in self.__dataclass_fields__ if n not in ("schedule", "seed")]
        found = {name: getattr(self, name) for name in names}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


@dataclass(frozen=True)
class Schedule:
    """How far on the way to its goal a model is after each step: gradual pruning's cubic.

    Attributes:
        initial: see `Pruning`.
        final: see `Pruning`.
        every: see `Pruning`.
    """

    initial: float = 0.1
    final: float = 0.1
    every: int | None = None

    def __post_init__(self) -> None:
        """See that it begins before it ends."""
        self._cubic  # noqa: B018  (its own checks)

    @cached_property
    def _cubic(self) -> GradualPruning:
        # Of a sparsity that is a power of two, so that the share of it is exact.
        return GradualPruning(0.5, initial=self.initial, final=self.final, every=self.every)

    def share(self, step: int, steps: int) -> float:
        """The share of what is to go that has gone after a step; 1 from the last event on."""
        return self._cubic.sparsity_at(step, steps) / self._cubic.target

    def events(self, steps: int) -> tuple[int, ...]:
        """The steps after which units go, ascending; nothing is left to go after the last one."""
        due = (s for s in range(1, steps + 1) if self._cubic.is_due(s, steps, s - 1 or -1))
        return tuple(s for s in due if self.share(s, steps))
