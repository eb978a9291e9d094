"""What a run is going to take: passes over the data, and memory by device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.signature import token_input
from graphprune.calibration.sources.amounts import REPAIRS, SCORES, WEIGHTS, Amount
from graphprune.calibration.tokens import window_length
from graphprune.errors import PlanError
from graphprune.placement import Placement
from graphprune.recipe.named import Repairing
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.selection import Selection
from graphprune.recipe.sparsify import Sparsify
from graphprune.recipe.steps import PASSES
from graphprune.report.forecast import about_size
from graphprune.streaming import find_sites
from graphprune.streaming.budget import working_bytes
from graphprune.training.core.options import Training

OF_GRADIENTS = ("taylor", "element1", "element2", "element-mix", "vector")
_HELD = ("taylor", "element1", "element-mix")
"""Scores that hold gradients of all weights, in float32."""


@dataclass(frozen=True)
class Worker:
    """A pass that takes data through the model.

    Attributes:
        name: of the score, the repair or the method.
        amount: of the data.
        times: how often it goes through; a gradient counts as two more.
        fits: whether it solves systems with second moments of what layers read.
        training: of how it trains, where it does.
    """

    name: str
    amount: Amount
    times: int
    fits: bool
    training: Training | None = None

    def passes(self, count: int, length: int | None) -> float:
        """How often all samples go through the model: a training has as much as it asks for.

        Args:
            count: of the samples.
            length: of each, where it has tokens.
        """
        asked = self.training
        if asked is None:
            return self.times
        if asked.steps is not None:
            return self.times * asked.steps * asked.batch / count
        if asked.tokens is not None:
            return self.times * asked.tokens / (count * (length or 1))
        return self.times * (1.0 if asked.epochs is None else asked.epochs)

    def held(self, params: int) -> int:
        """Bytes of a trainable copy, its gradients and the optimiser's state, in float32.

        Args:
            params: of the model.
        """
        if self.training is None:
            return 0
        return 4 * params * (4 if self.training.train == "full" else 1)


def workers(recipe: Recipe) -> list[Worker]:
    """The passes of a recipe that take data through the model, in order."""
    found = []
    for one in recipe.passes:
        wanted = one.options
        if not one.needs_data:
            continue
        if isinstance(wanted, Selection):
            name = wanted.score.name
            times = 3 if name in OF_GRADIENTS else 1
            found.append(Worker(name, REPAIRS if wanted.operates else SCORES, times,
                                wanted.operates))  # fmt: skip
        elif isinstance(wanted, Repairing):
            times = int(getattr(wanted.built(), "passes", 1))
            found.append(Worker(wanted.name, REPAIRS, times, wanted.name == "reconstruct"))
        elif isinstance(wanted, Sparsify):
            times = 1 + wanted.reference + (wanted.budget.name in ("owl", "sensitivity"))
            found.append(Worker(wanted.method, WEIGHTS, times, True))
        else:
            step = PASSES.build(one.name, wanted)
            amount = getattr(step, "amount", None)
            if amount is not None:
                training = getattr(step, "training", step)
                training = training if isinstance(training, Training) else None
                times = int(getattr(step, "passes", 1))
                found.append(Worker(one.name, amount, times, False, training))
    return found


def windows_of(program: BaseProgram, recipe: Recipe, amount: Amount) -> tuple[int, int | None]:
    """Samples, and the tokens of each where they are tokens."""
    wanted = recipe.calibration
    count = wanted.windows or amount.count
    if token_input(program.signature()) is None:
        return count, None
    return count, window_length(program, wanted, amount.length)


@dataclass(frozen=True)
class Estimate:
    """What a run takes, about.

    Attributes:
        passes: how often the data goes through the model.
        samples: how many go through in all, each as often as it does; at most.
        tokens: of these, where samples are tokens.
        memory: bytes of main memory, without mapped files.
        devices: bytes by the name of the device, for others than the processor.
    """

    passes: int
    samples: int
    tokens: int | None
    memory: int
    devices: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, program: BaseProgram, placement: Placement) -> Estimate | None:
        """The estimate for a recipe; None where no data is needed.

        Args:
            recipe: with a score and a repair in place of ``auto``.
            program: the dense program.
            placement: where it is calibrated.
        """
        found = workers(recipe)
        if not found:
            return None
        passes, samples, tokens, waiting = 0.0, 0.0, 0.0, 0
        for one in found:
            count, length = windows_of(program, recipe, one.amount)
            times = one.passes(count, length)
            passes += times
            samples += count * times
            tokens += count * times * (length or 0)
            waiting = max(waiting, waiting_bytes(program, count * (length or places(program))))
        working = _working(program, found)
        went = math.ceil(passes), round(samples), round(tokens) or None
        if not placement.away:
            return cls(*went, waiting + working)
        room = placement.room()
        here = waiting if room is None else min(waiting, max(0, room - working) // 2)
        devices = {str(placement): working + here}
        return cls(*went, waiting - here, devices)

    def __str__(self) -> str:
        often = "once" if self.passes == 1 else f"{self.passes} times"
        tokens = "" if self.tokens is None else f" ({self.tokens:,} tokens in all)"
        sizes = [f"{about_size(n)} of {name}" for name, n in self.devices.items()]
        sizes.append(f"{about_size(self.memory)} of memory")
        return (
            f"the data goes through the model {often}{tokens}; calibration takes about "
            f"{' and '.join(sizes)}, beside the model's weights"
        )


def waiting_bytes(program: BaseProgram, rows: int) -> int:
    """Bytes of the activations that wait between two groups of weights: two values for each row."""
    streams = [s.size for s in program.structures if s.role == "hidden"]
    width = max(streams, default=max((width_of(program, n) for n in program.trainable), default=1))
    return 2 * 4 * rows * width


def width_of(program: BaseProgram, parameter: str) -> int:
    """Inputs of a layer."""
    shape = program.parameters[parameter]
    return max(1, torch.Size(shape).numel() // max(1, max(shape[:1], default=1)))


def places(program: BaseProgram) -> int:
    """How often a weight is used for one sample, on average."""
    cost = program.costs.total()
    return max(1, cost.macs // max(1, cost.params))


def _working(program: BaseProgram, found: list[Worker]) -> int:
    """The most that weights, statistics, solves and gradients take at a time."""
    cost = program.costs.total()
    gradients = [
        cost.bytes + (4 * cost.params if one.name in _HELD else 0)
        for one in found
        if one.name in OF_GRADIENTS
    ]
    try:
        group = working_bytes(program, find_sites(program))
    except PlanError:  # nothing there that could be treated
        group = 0
    trained = [one.held(cost.params) for one in found]
    return max([group, *gradients, *trained])
