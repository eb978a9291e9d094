"""Minitron: the size of the activations that a unit hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.shared.activations import read
from graphprune.passes.shared.judging import unread
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class Minitron:
    """L2 norm over calibration samples of the mean absolute activation of a unit.

    With a the value that a consumer of the structure reads, for a unit that owns columns C::

        score = sqrt(sum over c in C, sum over samples of (mean over tokens of |a_c|)²)

    Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024
    (arXiv:2407.14679). An ffn is judged by the input of its last projection; a head by that of the
    output projection, all its channels together; hidden channels by the outputs of the norms, each
    counted once however many weights read it. One row per value that is read.
    """

    needs_data: ClassVar[bool] = True

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Structures that the score can't judge, to the reason."""
        return unread(program, structures, "minitron")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`.

        Raises:
            PlanError: there is no calibration data, an activation is not finite, or no weight
                multiplies by a structure's units.
        """
        found = read(program, structures, inputs, "minitron", SquaredMeans, lambda s: s.total)
        return {
            name: np.stack([np.sqrt(one.per_unit()) for one in readings])
            for name, readings in found.items()
        }


class SquaredMeans:
    """Sum over samples of the squared mean absolute value of every column.

    Attributes:
        total: [features], float64.
    """

    def __init__(self, features: int) -> None:
        """A sum of nothing."""
        self.total = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor, where: str = "") -> None:
        """Count the tokens ``[tokens, features]`` of a sample."""
        del where
        self.total += x.abs().mean(0, dtype=torch.float64).square().to(self.total)

    def totals(self) -> dict[str, Tensor]:
        """What processes add up."""
        return {"total": self.total}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""
        self.total = totals["total"]
