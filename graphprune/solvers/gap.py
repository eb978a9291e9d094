"""Closing the gap to a dense model, as far as it can be told from what a layer reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.factor import solve_damped


@dataclass(frozen=True, eq=False)
class Sample:
    """Moments of some of the tokens.

    Attributes:
        tokens: how many.
        hessian: [in, in], float64, E[x xᵀ] of what the layer reads.
        cross: [out, in], float64, E[g xᵀ] of the gap g.
    """

    tokens: int
    hessian: Tensor
    cross: Tensor


@dataclass(frozen=True)
class GapClosing:
    """Ridge regression of the gap on the kept inputs, its strength chosen by cross-validation.

    Most of a gap can't be told from the inputs of one layer; least squares would learn the noise.
    So every output gets the damping with which one half of the samples predicts the other best,
    or no change where none is better than that.

    Attributes:
        dampings: to choose from, for inputs of unit mean square.
    """

    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def __post_init__(self) -> None:
        if not self.dampings or min(self.dampings) <= 0:
            raise CalibrationError("dampings are positive numbers")

    def change(
        self, halves: Sequence[Sample], base: Sequence[Tensor], whole: Sample, kept: Tensor
    ) -> Tensor:
        """What to add to the weights.

        Args:
            halves: two disjoint sets of samples.
            base: [out, in] each: how the weights change anyway, as learnt from each half.
            whole: all samples.
            kept: [k] indices of the inputs that there are.

        Returns:
            [out, k], float64.
        """
        first, second = halves
        losses = torch.zeros(len(self.dampings) + 1, len(whole.cross), dtype=torch.float64)
        for seen, unseen, moved in ((first, second, base[0]), (second, first, base[1])):
            # E|g - (base + d) x|² on the unseen half, without what d doesn't change.
            slope = (moved.double() @ unseen.hessian[:, kept]) - unseen.cross[:, kept]
            within = unseen.hessian[kept][:, kept]
            for i, damping in enumerate(self.dampings, start=1):
                tried = _ridge(seen, kept, damping)
                losses[i] += unseen.tokens * ((tried @ within + 2 * slope) * tried).sum(1)
        best = losses.argmin(0)
        result = torch.zeros(len(whole.cross), len(kept), dtype=torch.float64)
        for i, damping in enumerate(self.dampings, start=1):
            if bool((best == i).any()):
                result = torch.where((best == i)[:, None], _ridge(whole, kept, damping), result)
        return result


def _ridge(sample: Sample, kept: Tensor, damping: float) -> Tensor:
    """[out, k]: the coefficients of the gap on the kept inputs, each in units of its own size.

    A few inputs are thousands of times as large as the rest (massive activations): a damping in
    units of their mean would silence all others.
    """
    hessian = sample.hessian[kept][:, kept]
    roots = hessian.diagonal().sqrt()
    roots = torch.where(roots > 0, roots, 1.0)
    right = sample.cross[:, kept] / roots
    scaled = (hessian / roots / roots[:, None]).contiguous()
    found, _ = solve_damped(scaled, right.T.contiguous(), damping)
    return found.T / roots
