"""The turns of passes that run several times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """Which turn of a ``repeat`` it is; the only one where nothing is repeated.

    Attributes:
        number: from 1.
        of: how many there are.
        given: whether goals are those of this turn, and not of the last one.
    """

    number: int = 1
    of: int = 1
    given: bool = False

    @property
    def share(self) -> float:
        """How much of the way to the goal there is at the end of this turn."""
        return 1.0 if self.given else self.number / self.of

    @property
    def part(self) -> tuple[float, float]:
        """Which part of all training this turn has, from where to where: the last one has half."""
        if self.given or self.of == 1:
            return 0.0, 1.0
        begin, end = ((n / (2 * (self.of - 1))) for n in (self.number - 1, self.number))
        return begin, end if self.number < self.of else 1.0

    @property
    def suffix(self) -> str:
        """What is said of a turn behind a name: " (2 of 3)"; nothing where there is one."""
        return f" ({self.number} of {self.of})" if self.of > 1 else ""
