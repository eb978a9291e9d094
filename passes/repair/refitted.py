"""What became of a refitted layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refitted:
    """What became of one consumer.

    Attributes:
        parameter: its name.
        removed: columns that are zero now, summed over its parts.
        before: relative error of its output without the refit, the mean over its parts.
        error: the same with it.
        bias: name of the bias that was fitted with it.
        notes: what was unusual.
    """

    parameter: str
    removed: int
    before: float
    error: float
    bias: str | None = None
    notes: tuple[str, ...] = ()
