"""What a run tells while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self


class Note(str):
    """A remark among the names of stages: something to read, that should stay on the screen."""

    __slots__ = ()


class Part(str):
    """How far a stage is: "pruning weights: group 3 of 12", and the numbers in it.

    Attributes:
        stage: its name.
        done: how many units of work are over.
        total: how many there are.
        quick: whether this one says nothing of how long the others take: it was done before.
        left: seconds until the stage is over, where whoever tells knows; None otherwise.
    """

    stage: str
    done: int
    total: int
    quick: bool
    left: float | None

    def __new__(
        cls,
        stage: str,
        done: int,
        total: int,
        *,
        unit: str = "",
        rest: str = "",
        quick: bool = False,
        left: float | None = None,
    ) -> Self:
        """A part of a stage.

        Args:
            stage: its name.
            done: how many units of work are over.
            total: how many there are.
            unit: what one of them is called: "group".
            rest: what else there is to say.
            quick: see `Part`.
            left: see `Part`.
        """
        words = (f"{stage}:", *((unit,) if unit else ()), f"{done} of {total}{rest}")
        found = super().__new__(cls, " ".join(words))
        found.stage, found.done, found.total = stage, done, total
        found.quick, found.left = quick, left
        return found


class Pace:
    """How long the rest of a stage takes, by what its parts have taken."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """A stage that begins now."""
        self._clock = clock
        self._begun = clock()
        self._before = 0

    def left(self, part: Part) -> float | None:
        """Seconds after a part until the stage is over; None where nobody can tell yet."""
        if part.left is not None:
            return part.left
        if part.quick:
            self._begun, self._before = self._clock(), part.done
        counted = part.done - self._before
        if counted <= 0:
            return None
        return (self._clock() - self._begun) / counted * (part.total - part.done)
