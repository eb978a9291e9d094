"""ALPS: mask and weights together by ADMM, then conjugate gradients on the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.solvers.factor import Damped, damp
from graphprune.solvers.magnitude import without_data
from graphprune.solvers.pattern import Given, Pattern
from graphprune.solvers.precision import exact
from graphprune.solvers.solved import Solved, masked, second_moment, widened
from graphprune.solvers.statistic import SecondMoment, Statistic


@dataclass(frozen=True, eq=False)
class _Problem:
    """min tr((B - W) A (B - W)ᵀ) with features scaled to a unit diagonal of A.

    Attributes:
        matrix: [in, in], A.
        roots: [in], what weights are multiplied by.
        damped: the Hessian's damping, without its matrix.
    """

    matrix: Tensor
    roots: Tensor
    damped: Damped


@dataclass(frozen=True)
class ALPS:
    """Layer-wise pruning as one problem over mask and weights.

    ADMM splits it: B is free and close to the dense output, D has the pattern, and a penalty rho
    draws them together. rho grows with the change of the mask, until the mask stands; then the
    weights on it are solved by conjugate gradients. Meng et al., ALPS: Improved Optimization for
    Highly Sparse One-Shot Pruning for Large Language Models, 2024 (arXiv:2406.07831).

    Attributes:
        damping: added to the diagonal of H, in units of its mean over the inputs that are not
            always zero.
        rho: first penalty, for features of unit norm. If the mask doesn't move at first, rho is a
            fifth of it, until it does.
        steps: most steps of ADMM.
        every: steps between two looks at the mask.
        growth: a change of at least `share` of the kept weights multiplies rho by `factor`; pairs
            of share and factor, shares descending. Any smaller change takes the last factor.
        settled: from step `patience` on, a change below this share of the kept weights is none.
        patience: see `settled`.
        refits: most steps of conjugate gradients.
        tolerance: of their residual, relative to the right-hand side.
    """

    damping: float = 0.01
    rho: float = 0.1
    steps: int = 300
    every: int = 3
    growth: tuple[tuple[float, float], ...] = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
    settled: float = 3e-4
    patience: int = 30
    refits: int = 10
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.steps < 1 or self.every < 1 or not 0 < self.damping <= 1:
            raise RecipeError("ALPS takes positive steps, rho and damping; damping is at most 1")
        shares = [share for share, _ in self.growth]
        if len(shares) < 2 or shares[-1] != 0 or sorted(shares, reverse=True) != shares:
            raise RecipeError("ALPS takes two growths of rho or more, shares descending to 0")

    def solve(self, weight: Tensor, statistic: Statistic, pattern: Pattern) -> Solved:
        """Prune one layer.

        Args:
            weight: [out, in]; solved in float32, or in float64 if that is its type.
            statistic: second moment of its inputs; if silent, the layer is pruned by magnitude.
            pattern: what the mask may be; for a given one only the weights are solved.

        Raises:
            CalibrationError: see `check`.
        """
        if (solved := without_data(weight, statistic, pattern)) is not None:
            return solved
        statistic = second_moment(statistic)
        wide = widened(weight)
        key = ("alps", self.damping, wide.dtype)
        problem = statistic.derived(key, lambda: self._pose(statistic, wide.dtype))
        dense = (wide * problem.roots).masked_fill_(problem.damped.dead, 0)
        with exact():
            target = dense @ problem.matrix
            kept = pattern.mask(dense.square(), weight)
            first = dense * kept
            if isinstance(pattern, Given):
                found = self._refit(first, target, kept, problem.matrix)
            elif not kept.all():
                sparse, moved = self._split(target, first, kept, problem.matrix, pattern, weight)
                found = self._refit(sparse, target, moved, problem.matrix)
                # Where features are all but orthogonal, ADMM may end beside the mask it began with.
                if _lost(found, dense, problem.matrix) > _lost(first, dense, problem.matrix):
                    found = self._refit(first, target, kept, problem.matrix)
                else:
                    kept = moved
        if kept.all():
            return masked(weight, kept, statistic, pattern)
        updated = torch.where(problem.damped.dead, wide, found / problem.roots)
        return masked(weight, kept, statistic, pattern, problem.damped.notes, updated=updated)

    def _pose(self, statistic: SecondMoment, dtype: torch.dtype) -> _Problem:
        """Scale the damped Hessian to a unit diagonal, in float64."""
        damped = damp(statistic.hessian.double(), self.damping)
        roots = damped.matrix.diagonal().sqrt()
        matrix = damped.matrix.div_(roots).div_(roots[:, None])
        rest = Damped(matrix.new_empty(0), damped.dead, damped.mean, self.damping, self.damping)
        return _Problem(matrix.to(dtype), roots.to(dtype), rest)

    def _split(
        self,
        target: Tensor,
        first: Tensor,
        kept: Tensor,
        matrix: Tensor,
        pattern: Pattern,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """ADMM from D = `first`, whose mask is `kept`. Returns D and its mask."""
        rho, moved = self.rho, False
        inverse = _inverse(matrix, rho)
        sparse, before = first, kept
        budget = max(int(kept.sum()), 1)
        dual = torch.zeros_like(target)  # divided by rho
        for step in range(1, self.steps + 1):
            pull = torch.sub(sparse, dual).mul_(rho).add_(target)
            dual.addmm_(pull, inverse)  # with B = pull @ inverse: what D projects
            kept = pattern.mask(dual.square(), weight)
            sparse = dual * kept
            dual -= sparse
            if step % self.every:
                continue
            change = int((kept ^ before).sum())
            before = kept
            if change == 0 and moved:
                break
            if step >= self.patience and change < self.settled * budget:
                break
            grow = next((f for share, f in self.growth if change > share * budget), 0.0)
            if moved or change > self.growth[-2][0] * budget:
                moved, new = True, min(rho * grow, 1e6)
            else:  # rho holds the mask where it started: begin again with less of it
                new, sparse, dual = rho / 5, first, torch.zeros_like(dual)
                if new < self.damping * 1e-6:  # far below any eigenvalue: it moves nothing
                    break
            dual *= rho / new
            rho = new
            inverse = _inverse(matrix, rho)
        return sparse, kept

    def _refit(self, start: Tensor, target: Tensor, kept: Tensor, matrix: Tensor) -> Tensor:
        """Conjugate gradients for ``(x A - target) * kept = 0``, all rows at once.

        Features have a unit diagonal, so this is preconditioned already. Every step lowers every
        row's error.
        """
        x = start.clone()
        residual = (target - x @ matrix).mul_(kept)
        direction = residual.clone()
        size = residual.square().sum(1, keepdim=True)
        enough = (target * kept).square().sum(1, keepdim=True) * self.tolerance**2
        for _ in range(self.refits):
            if bool((size <= enough).all()):
                break
            image = (direction @ matrix).mul_(kept)
            length = size / _nonzero((direction * image).sum(1, keepdim=True))
            x += length * direction
            residual -= length * image
            smaller = residual.square().sum(1, keepdim=True)
            direction.mul_(smaller / _nonzero(size)).add_(residual)
            size = smaller
        return x


def _inverse(matrix: Tensor, rho: float) -> Tensor:
    """(A + rho)⁻¹. A new one for every rho costs less than the eigenvectors that would give all."""
    # The least eigenvalue is rho or more, and the trace is the number of features.
    wide = matrix.double() if rho < 1e-3 else matrix.clone()
    wide.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(wide)).to(matrix.dtype)


def _lost(x: Tensor, dense: Tensor, matrix: Tensor) -> float:
    """The objective: squared change of the output."""
    change = x - dense
    return float((change * (change @ matrix)).sum(dtype=torch.float64))


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)
