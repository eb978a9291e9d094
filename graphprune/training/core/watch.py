"""What is watched while a model trains: that losses are numbers and fall, and signals to stop."""

from __future__ import annotations

import math
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from graphprune.errors import TrainingError

WINDOW = 20
"""Steps whose mean loss is compared with the first one's."""

_FACTOR = 3.0
_SMALL = 0.01
"""A loss that nobody would call diverged: what begins as its teacher's twin begins at 0."""


@dataclass
class Watch:
    """Stops a run whose loss is no number, or has grown to three times that of the start.

    Attributes:
        saved: where the last good state is, for messages; None if nothing is saved.
        since: the step whose loss others are compared with.
    """

    saved: str | None = None
    since: int = 0
    first: float | None = None
    last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """Before a step is taken.

        Raises:
            TrainingError: the loss or the norm of the gradients is no number.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise TrainingError(
            f"the {what} is no longer a number",
            where=f"step {step + 1}",
            why=f"the loss is {loss}, the norm of the gradients {norm}",
            hint=f"use a lower learning rate, or look for errors in the data; {self._good()}",
        )

    def add(self, step: int, loss: float) -> None:
        """After a step.

        Raises:
            TrainingError: training diverges.
        """
        self.first = loss if self.first is None else self.first
        self.last.append(loss)
        mean = sum(self.last) / len(self.last)
        if len(self.last) == WINDOW and mean > max(_FACTOR * self.first, _SMALL):
            raise TrainingError(
                "training diverges",
                where=f"step {step + 1}",
                why=f"the mean loss of {WINDOW} steps is {mean:.4g}, and it began at "
                f"{self.first:.4g}",
                hint=f"use a lower learning rate; {self._good()}",
            )

    def restart(self, step: int) -> None:
        """Compare with the loss of a later step: from there on another model trains."""
        self.since, self.first = step, None
        self.last.clear()

    def _good(self) -> str:
        if self.saved is None:
            return "the model is as it was before training"
        return f"the last good state is in {self.saved}"


@dataclass
class Stop:
    """Whether a signal to end has come; the step that is being computed is finished first."""

    number: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        """As a signal's handler."""
        self.number = number


@contextmanager
def stopping() -> Iterator[Stop]:
    """Note SIGTERM until the block is over; then it comes.

    Only the main thread can; in others nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is None:  # other code's than Python's
        yield stop
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        if stop.number is not None:
            signal.raise_signal(stop.number)
