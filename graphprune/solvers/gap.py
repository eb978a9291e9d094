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
    or no change where none is better than that. With fewer tokens than inputs nothing changes:
    any gap is a combination of so many inputs, and where samples resemble each other, as those of
    one recording do, one half would agree with the other all the same.

    Attributes:
        dampings: to choose from, for inputs of unit mean square.
    """

    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def __post_init__(self) -> None:
        if not self.dampings or min(self.dampings) <= 0:
            raise CalibrationError("dampings are positive numbers")

    @staticmethod
    def too_few(whole: Sample, kept: Tensor) -> bool:
        """Whether there are fewer tokens than kept inputs."""
        return whole.tokens < len(kept)

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
            [out, k], float64; zero if `too_few`.
        """
        if self.too_few(whole, kept):
            return whole.cross.new_zeros(len(whole.cross), len(kept))
        own = [_Ridge(half, kept) for half in halves]
        losses = whole.cross.new_zeros(len(self.dampings) + 1, len(whole.cross))
        for seen, unseen in ((0, 1), (1, 0)):
            judge = _Judge(halves[unseen], own[unseen], base[seen], kept)
            for i, damping in enumerate(self.dampings, start=1):
                losses[i] += judge.loss(own[seen].solve(damping))
        del own
        best = losses.argmin(0)
        result = whole.cross.new_zeros(len(whole.cross), len(kept))
        last = _Ridge(whole, kept)
        for i, damping in enumerate(self.dampings, start=1):
            rows = (best == i).nonzero().squeeze(1)
            if len(rows):
                result[rows] = last.solve(damping, rows)
        return result


class _Ridge:
    """The coefficients of a gap on the kept inputs, each in units of its own size.

    A few inputs are thousands of times as large as the rest (massive activations): a damping in
    units of their mean would silence all others.
    """

    def __init__(self, sample: Sample, kept: Tensor) -> None:
        hessian = sample.hessian[kept][:, kept]
        roots = hessian.diagonal().sqrt()
        self.roots = torch.where(roots > 0, roots, 1.0)
        self.matrix = hessian / self.roots / self.roots[:, None]
        self.right = (sample.cross[:, kept] / self.roots).T.contiguous()

    def solve(self, damping: float, rows: Tensor | None = None) -> Tensor:
        """[out, k] for some of the outputs or all."""
        right = self.right if rows is None else self.right[:, rows]
        found, _ = solve_damped(self.matrix.clone(), right, damping)
        return found.T / self.roots


class _Judge:
    """How well samples that a regression hasn't seen are predicted."""

    def __init__(self, sample: Sample, scaled: _Ridge, base: Tensor, kept: Tensor) -> None:
        self.tokens, self.roots = sample.tokens, scaled.roots
        # The quadratic form only decides between dampings a decade apart.
        self.matrix = scaled.matrix.float()
        slope = (base.double() @ sample.hessian[:, kept]) - sample.cross[:, kept]
        self.slope = 2 * slope / self.roots

    def loss(self, change: Tensor) -> Tensor:
        """[out], float64: E|g - (base + change) x|² times tokens, less its value without change."""
        change = change * self.roots
        product = change.float() @ self.matrix
        return self.tokens * ((product + self.slope) * change).sum(1)
