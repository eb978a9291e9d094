"""A training run, and what takes part in it beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from graphprune.training.core.options import Training
from graphprune.training.core.order import Order
from graphprune.training.core.processes import Processes
from graphprune.training.core.samples import Feed, Samples
from graphprune.training.model.objective import Objective
from graphprune.training.model.trainable import Trainable
from graphprune.training.state import Saved


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        step: steps that are done.
        steps: of the whole run.
        loss: mean over the tokens of the last step.
        tokens: that were trained on so far.
        seconds: since this process began.
        left: seconds until the end, about.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float
    left: float


class Callback:
    """Something that takes part in a run: masks that grow, gates, shares of domains.

    What each method does here is nothing; a callback overrides those that it needs. Everything that
    it does depends on its options, the step and what it saves alone, so that an interrupted run
    goes on to the same bits. Every process has its own, which do the same in all. Steps are
    counted from 0.
    """

    def identity(self) -> Any:
        """What it is, as JSON values: a state that was saved with another one is refused."""
        return type(self).__name__

    def attach(self, run: Run) -> None:
        """Join a run whose first step is still to come; it may exchange what the run has.

        Raises:
            TrainingError: they don't fit.
        """

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser changes beside the weights, by names of its own.

        Their gradients are means over the tokens of a step, and no limit is set to them. They are
        saved with the weights.
        """
        return {}

    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimiser's groups of these parameters.

        Each has its highest learning rate as "peak", which rises and falls as that of the weights.
        """
        return []

    def on_gradients(self, step: int, scale: float) -> None:
        """Called when the gradients of a step are there, before they are scaled or clipped.

        Args:
            step: which is about to be taken.
            scale: what makes the gradients, which are sums over the tokens of all processes, those
                of the mean.
        """

    def before_step(self, step: int) -> None:
        """Called before the optimiser changes anything; gradients may still be added."""

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Called when a step is taken, and zeros are filled in.

        Returns:
            Whether the model is another one now, whose loss begins anew.
        """
        del step, optimizer
        return False

    def tensors(self) -> Mapping[str, Tensor]:
        """What else is saved after a step, by names of its own."""
        return {}

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was saved, with weights, parameters and moments as they were.

        Here the tensors are copied into those that there are.

        Args:
            step: the next one.
            tensors: what was saved.

        Raises:
            KeyError: something is missing.
        """
        del step
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


@dataclass
class Run:
    """A training run: everything that a step needs.

    Attributes:
        objective: the student with its loss, wrapped as the processes need.
        trainable: what trains.
        training: options.
        samples: the data.
        feed: makes what the model is called with.
        order: which samples each step sees.
        everyone: the processes.
        saved: where progress is saved; None for nowhere.
        progress: told after each step.
        callbacks: what takes part beside the weights, in the order in which each is called.
    """

    objective: Objective
    trainable: Trainable
    training: Training
    samples: Samples
    feed: Feed
    order: Order
    everyone: Processes
    saved: Saved | None = None
    progress: Callable[[Progress], None] | None = None
    callbacks: Sequence[Callback] = ()
    losses: list[float] = field(default_factory=list)
    tokens: int = 0

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that train beside the weights; each callback has a space of names."""
        return {
            f"{place}/{name}": parameter
            for place, one in enumerate(self.callbacks)
            for name, parameter in one.parameters().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """What callbacks save beside parameters."""
        return {
            f"{place}/{name}": tensor
            for place, one in enumerate(self.callbacks)
            for name, tensor in one.tensors().items()
        }

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Have callbacks go on from what they saved.

        Raises:
            KeyError: something is missing.
        """
        for place, one in enumerate(self.callbacks):
            space = f"{place}/"
            own = {n.removeprefix(space): t for n, t in tensors.items() if n.startswith(space)}
            one.restore(step, own)
