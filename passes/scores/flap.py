"""FLAP: how much of what a unit hands on can't be replaced by its mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.shared.activations import Reading, column_sums, read
from graphprune.passes.shared.judging import unread
from graphprune.passes.shared.score import Inputs
from graphprune.plan.units import FloatArray
from graphprune.solvers import Norms

ATTENTION = ("kv_heads", "query_heads", "v_dim")
"""Roles of what attention hands on."""


@dataclass(frozen=True)
class Flap:
    """Standard scores of the weighted input feature variance of a unit's columns, their mean.

    For column j of a consumer with weight W that reads x::

        f_j = (mean over tokens of (x_j - mean of x_j)²) * sum over i of W_ij²
        z_j = (f_j - mean of f) / (standard deviation of f)     f_j² instead of f_j for attention
        score = mean of z_j over the columns that the unit owns

    The mean and deviation are over all columns of the consumer that belong to the structure, so
    that the units of all layers can be ranked together; `graphprune.select` doesn't normalise the
    scores again. A bias can make up for the mean of what is removed, the fluctuation is lost. An et
    al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, 2024
    (arXiv:2312.11983). One row per consumer.
    """

    needs_data: ClassVar[bool] = True

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Structures that the score can't judge, to the reason."""
        return unread(program, structures, "flap")

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        found = read(
            program, structures, inputs, "flap", Fluctuation, lambda s: s.variances, _weighed
        )
        return {
            name: np.stack([_standard(one) for one in readings]) for name, readings in found.items()
        }


class Fluctuation:
    """Variance of every column over all tokens.

    It is that of the differences to the mean of the first sample: a channel's mean can be far
    larger than what it varies by, and its square would drown the variance.
    """

    def __init__(self, features: int) -> None:
        """Of no token."""
        self._near: Tensor | None = None
        self._apart = Norms(features)

    def add(self, x: Tensor, where: str = "") -> None:
        """Count tokens ``[tokens, features]``."""
        if self._near is None:
            self._near = x.mean(0)
        self._apart.add(x - self._near, where)

    def totals(self) -> dict[str, Tensor]:
        """What processes add up: sums about zero, in float64, since each has another mean."""
        found = self._apart.totals()
        if self._near is None:
            return found
        near = self._near.to(found["sums"])
        sums = found["sums"] + self._apart.tokens * near
        squares = found["squares"] + near * (found["sums"] + sums)
        return {**found, "sums": sums, "squares": squares}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""
        self._apart.take(totals)
        self._near = torch.zeros_like(totals["sums"])

    @property
    def variances(self) -> Tensor:
        """[features], float64: mean squared distance from the mean."""
        return self._apart.variances


def _weighed(matrix: Tensor, variances: FloatArray) -> FloatArray:
    return column_sums(matrix, torch.square) * variances


def _standard(reading: Reading) -> FloatArray:
    """Standard scores of the columns, their mean for each unit."""
    squared = reading.structure.role in ATTENTION
    values = np.square(reading.values) if squared else reading.values
    own = values[reading.owned]
    deviation = own.std()
    standard = (values - own.mean()) / (deviation if deviation > 0 else 1.0)
    count = reading.per_unit(np.ones_like(values))
    return reading.per_unit(standard) / np.maximum(count, 1)
