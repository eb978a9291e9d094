"""Magnitude: the size of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.shared.reduce import Salience
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
        salience: Salience = torch.abs if self.norm == "l1" else _Squares()
        return member_sums(program, structures, lambda name: (program.weights[name],), salience)


class _Squares:
    """Squares of one piece of a weight after the other, all in the same memory."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.is_complex():
            weight = weight.abs()
        if weight.device.type != "cpu":
            return weight.square()
        room = self._room
        if room.numel() < weight.numel() or room.dtype != weight.dtype:
            self._room = room = torch.empty(weight.numel(), dtype=weight.dtype, device="cpu")
        return torch.mul(weight, weight, out=room[: weight.numel()].view(weight.shape))
