"""LLM-Pruner's importance of structures: Ma et al., LLM-Pruner, 2023 (arXiv:2305.11627).

All four start from what the loss changes by, to first or second order, when a weight becomes zero.
With g the gradient of the mean loss over the calibration samples, g_n that of sample n alone, and
h the mean of ``g_n²``, the diagonal of the Fisher information in place of the Hessian's::

    element1      s = w * g                    sum of |s| over what a unit owns
    element2      s = w² * h                   sum of s
    element-mix   s = w * g - 0.5 * w² * h     sum of |s|
    vector        s = w * g                    sum of |sum of s over a row or column|

The paper leaves biases out. Here a unit owns its bias, which leaves with it, so that it is scored
by the same formula. Every weight counts for the unit that owns it: a query head for its own
key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.scores.taylor import check_batch, first_order, weights_with
from graphprune.passes.shared.gradients import (
    batches_of,
    differentiable,
    moments,
    samples_of,
    summed,
)
from graphprune.passes.shared.score import Inputs, Sums, distributed, member_sums, wanted_dims
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class Element1:
    """Element-wise, first order: sum of ``|w * g|``. It is score taylor under its other name.

    Attributes:
        batch: calibration windows per forward and backward pass, where calibration is a tensor.
            The result doesn't depend on it. With one batch for all no gradient is held.
    """

    needs_data: ClassVar[bool] = True
    batch: int = 4

    def __post_init__(self) -> None:
        check_batch(self.batch, "element1")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`.

        Raises:
            PlanError: the model is no PyTorch graph, there is no calibration data, or the loss or
                a gradient is not finite.
        """
        traced = differentiable(program, inputs, "element1")
        batches = batches_of(inputs.calibration, self.batch)
        return first_order(traced, structures, batches, inputs.loss)


@dataclass(frozen=True)
class Element2:
    """Element-wise, second order: sum of ``w² * h``.

    A forward and backward pass for every sample; sums over samples need no gradient to be held. A
    calibration batch that is no tensor counts as one sample.
    """

    needs_data: ClassVar[bool] = True

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `Element1.score`."""
        traced = differentiable(program, inputs, "element2")
        dims = wanted_dims(traced, structures)
        samples = samples_of(inputs.calibration)
        sums = summed(traced, dims, samples, inputs.loss, lambda w, g: (w * g).square_())
        return distributed(traced, structures, lambda name: sums[name])


@dataclass(frozen=True)
class ElementMix:
    """Element-wise, mixed: sum of ``|w * g - 0.5 * w² * h|``.

    A forward and backward pass for every sample; g and h are held in float32. A calibration batch
    that is no tensor counts as one sample.
    """

    needs_data: ClassVar[bool] = True

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `Element1.score`."""
        traced = differentiable(program, inputs, "element-mix")
        names = list(wanted_dims(traced, structures))
        mean, fisher = moments(traced, names, samples_of(inputs.calibration), inputs.loss)
        return member_sums(traced, structures, weights_with(traced, mean, fisher), _mixed)


@dataclass(frozen=True)
class Vector:
    """Vector-wise: sum of ``|sum of w * g|``, the inner one over each row or column of a unit.

    The absolute value is taken for every position of the dimension that a unit is removed from: for
    a head, of each of its rows (of the output projection, its columns); for layers, of the indices
    of the first dimension. No gradient is held.

    Attributes:
        batch: calibration windows per forward and backward pass, where calibration is a tensor.
            The result doesn't depend on it.
    """

    needs_data: ClassVar[bool] = True
    batch: int = 4

    def __post_init__(self) -> None:
        check_batch(self.batch, "vector")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `Element1.score`."""
        traced = differentiable(program, inputs, "vector")
        dims = wanted_dims(traced, structures)
        batches = batches_of(inputs.calibration, self.batch)
        sums = summed(traced, dims, batches, inputs.loss, torch.mul)

        def absolute(name: str) -> Sums:
            return {dim: np.abs(found) for dim, found in sums[name].items()}

        return distributed(traced, structures, absolute)


def _mixed(weight: torch.Tensor, gradient: torch.Tensor, fisher: torch.Tensor) -> torch.Tensor:
    return (weight * gradient - 0.5 * weight.square() * fisher).abs_()
