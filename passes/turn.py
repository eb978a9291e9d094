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
    def suffix(self) -> str:
        """What is said of a turn behind a name: " (2 of 3)"; nothing where there is one."""
        return f" ({self.number} of {self.of})" if self.of > 1 else ""
