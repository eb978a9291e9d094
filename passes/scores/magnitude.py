"""Magnitude: the size of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.shared.score import Inputs, member_sums
from graphprune.plan.units import FloatArray


@dataclass(frozen=True)
class Magnitude:
    """Sum of ``|w|`` (l1) or ``w²`` (l2) over what a unit owns.

    Needs no data. Li et al., Pruning Filters for Efficient ConvNets, 2017 (arXiv:1608.08710), for
    filters; Fang et al., DepGraph, 2023 (arXiv:2301.12900), for coupled ones. For l2 the sum of
    squares is not followed by a root, so that members of different size add up as one vector.

    Attributes:
        norm: l1 or l2.
    """

    norm: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise PlanError(f"unknown norm {self.norm!r}", hint="the norms are l1 and l2")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        return member_sums(program, structures, lambda name: (program.weights[name],), self._of)

    def _of(self, weight: torch.Tensor) -> torch.Tensor:
        if self.norm == "l1" or weight.is_complex():
            weight = weight.abs()
        return weight if self.norm == "l1" else weight.square()
