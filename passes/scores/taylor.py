"""Taylor: what the loss would change by, to first order, if a weight were zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.shared.gradients import (
    Batch,
    batches_of,
    differentiable,
    mean_gradients,
    summed,
)
from graphprune.passes.shared.score import Inputs, Loss, distributed, member_sums, wanted_dims
from graphprune.placement import present
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class Taylor:
    """Sum of ``|w * g|`` over what a unit owns, g the gradient of the mean calibration loss.

    Molchanov et al., Importance Estimation for Neural Network Pruning, 2019 (arXiv:1906.10771);
    the absolute value is taken per element, as LLM-Pruner's Element¹ does (Ma et al., 2023,
    arXiv:2305.11627).

    Attributes:
        batch: calibration windows per forward and backward pass, where calibration is a tensor.
    """

    needs_data: ClassVar[bool] = True
    batch: int = 4

    def __post_init__(self) -> None:
        check_batch(self.batch, "taylor")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`.

        Raises:
            PlanError: the model is no PyTorch graph, there is no calibration data, or the loss or
                a gradient is not finite.
        """
        traced = differentiable(program, inputs, "taylor")
        batches = batches_of(inputs.calibration, self.batch)
        return first_order(traced, structures, batches, inputs.loss)


def check_batch(batch: int, score: str) -> None:
    """Refuse a batch without windows."""
    if batch < 1:
        raise PlanError("a batch has at least one window", where=f"score {score}")


def first_order(
    program: Program, structures: Sequence[Structure], batches: Sequence[Batch], loss: Loss | None
) -> dict[str, FloatArray]:
    """Sum of ``|w * g|`` over what a unit owns, g the gradient of the mean loss over all samples.

    Of one batch no gradient outlives its parameter's turn. Of several their mean is held in
    float32, since it has to be complete before an absolute value can be taken.
    """
    dims = wanted_dims(program, structures)
    if len(batches) == 1:
        sums = summed(program, dims, batches, loss, _absolute)
        return distributed(program, structures, lambda name: sums[name])
    gradients = mean_gradients(program, list(dims), batches, loss)
    return member_sums(program, structures, weights_with(program, gradients), _absolute)


def weights_with(
    program: Program, *statistics: Mapping[str, torch.Tensor]
) -> Callable[[str], tuple[torch.Tensor, ...]]:
    """A parameter's weight and its entries of `statistics`, for `member_sums`."""

    def tensors(name: str) -> tuple[torch.Tensor, ...]:
        weight = present().bring(program.weights[name].detach())
        # A parameter that the loss does not depend on can go for free.
        zero = torch.zeros((), device=weight.device).expand_as(weight)
        return weight, *(s.get(name, zero) for s in statistics)

    return tensors


def _absolute(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return (weight * gradient).abs_()
