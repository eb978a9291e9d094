"""What sees the activations of a streamed run."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.precision import finite


class Observer(Protocol):
    """Something that accumulates a statistic of activations. See also `Checking`."""

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""


@runtime_checkable
class Checking(Protocol):
    """An observer that looks for itself whether rows are finite: nobody else has to read them.

    Attributes:
        checks: True; `add` then raises `CalibrationError` for rows that are not finite.
    """

    checks: ClassVar[bool]

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""


def show(observer: Observer, rows: Tensor) -> bool:
    """Show rows to an observer, if they are finite, and say whether they are.

    Raises:
        CalibrationError: the observer has another reason to refuse them.
    """
    if not (isinstance(observer, Checking) and observer.checks):
        if not finite(rows):
            return False
        observer.add(rows)
        return True
    try:
        observer.add(rows)
    except CalibrationError:
        if finite(rows):
            raise
        return False
    return True
