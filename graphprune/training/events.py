"""What else happens in the course of a training, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import Optimizer

from graphprune.training.core.processes import Processes
from graphprune.training.model.trainable import Trainable


class Events(Protocol):
    """Looks at the gradients of each step, and may change masks after it.

    In several processes each of them has one, which does the same in all.
    """

    def identity(self) -> Any:
        """What it is, as JSON values; a state that was saved by another one is refused."""

    def begin(self, trainable: Trainable, steps: int, everyone: Processes) -> None:
        """Before the first step, or before `restore`.

        Args:
            trainable: what trains.
            steps: of the whole run.
            everyone: the processes.
        """

    def look(self, step: int, scale: float) -> None:
        """Before the optimiser takes a step, and before gradients are scaled or clipped.

        Args:
            step: from 1.
            scale: what makes the gradients, which are sums over the tokens of all processes, those
                of the mean.
        """

    def change(self, step: int, optimizer: Optimizer) -> bool:
        """After a step; whether the model is another one now, whose loss begins anew."""

    def tensors(self) -> dict[str, Tensor]:
        """What to save after a step."""

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was saved after a step, with weights and moments as they were.

        Raises:
            KeyError: something is missing.
        """
