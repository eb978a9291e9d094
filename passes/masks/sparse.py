"""What became of the weights that a mask was put on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.analysis.program import BaseProgram


@dataclass(frozen=True)
class Layer:
    """What became of one parameter.

    Attributes:
        parameter: its name.
        weights: number of weights.
        removed: how many of them the mask removes.
        error: relative error of the layer's output on the calibration data, the mean over its
            parts (experts, groups of channels); None where no solver could tell.
        notes: what was unusual.
        zeros: how many of its weights are zero as they are stored. That may be more than
            `removed`: a weight that stays may be zero already, or be rounded to zero.
        target: the sparsity that was asked for.
    """

    parameter: str
    weights: int
    removed: int
    error: float | None
    notes: tuple[str, ...]
    zeros: int
    target: float

    @property
    def sparsity(self) -> float:
        """Fraction of its weights that the mask removes."""
        return self.removed / self.weights


@dataclass(frozen=True)
class Sparse:
    """A program with zeros in place of what a mask removed.

    Attributes:
        program: saves in every format by `graphprune.apply` with an empty plan.
        layers: one entry per treated parameter, in the order of treatment.
        skipped: parameter to the reason why it was left alone.
        reordered: further parameters whose channels have other places; see `RIA.permute`.
    """

    program: BaseProgram
    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]
    reordered: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the treated parameters that masks remove."""
        return sum(e.removed for e in self.layers) / sum(e.weights for e in self.layers)

    @property
    def sparsity_of_model(self) -> float:
        """The same weights as a fraction of all parameters of the model, tied ones once."""
        return sum(e.removed for e in self.layers) / self.program.costs.total().params
