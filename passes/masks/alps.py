"""ALPS: mask and weights together by ADMM, then conjugate gradients on the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import hardshrink

from graphprune.errors import RecipeError
from graphprune.passes.masks.magnitude import without_data
from graphprune.solvers.factor import Damped, damp, lower_factor
from graphprune.solvers.pattern import SCATTER, Given, Pattern, Unstructured
from graphprune.solvers.precision import exact, inner
from graphprune.solvers.solved import Solved, masked, second_moment, widened
from graphprune.solvers.statistic import SecondMoment, Statistic

SAMPLED = 2**16
"""Entries that tell between two looks at the mask what goes: some 0.2 % too many or too few."""


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
        relaxation: of ADMM, between 0 and 2; above 1 each step goes beyond B, away from D.
        refits: most steps of conjugate gradients.
        tolerance: they end with a step that lowers the error by less than this, relative to it.
    """

    needs_data: ClassVar[bool] = True
    damping: float = 0.01
    rho: float = 0.05
    steps: int = 300
    every: int = 3
    growth: tuple[tuple[float, float], ...] = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.2))
    settled: float = 3e-4
    patience: int = 12
    relaxation: float = 1.3
    refits: int = 10
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.steps < 1 or self.every < 1 or not 0 < self.damping <= 1:
            raise RecipeError("ALPS takes positive steps, rho and damping; damping is at most 1")
        if not 0 < self.relaxation < 2:
            raise RecipeError("ALPS takes a relaxation between 0 and 2")
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
            kept = pattern.mask(dense.square(), weight)
            first = dense * kept
            if isinstance(pattern, Given):
                found, _ = self._refit(first, dense, kept, problem.matrix)
            elif not kept.all():
                target = dense @ problem.matrix
                sparse, moved = self._split(target, first, kept, problem.matrix, pattern, weight)
                found, lost = self._refit(sparse, dense, moved, problem.matrix)
                # Where features are all but orthogonal, ADMM may end beside the mask it began with.
                if lost > _lost(first, dense, problem.matrix):
                    found, _ = self._refit(first, dense, kept, problem.matrix)
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
        resolvent = _Resolvent(matrix, rho, len(target))
        sparse, before = first, kept
        budget = max(int(kept.sum()), 1)
        rough = _rough(target, kept, pattern)
        dual = torch.zeros_like(target)  # divided by rho
        for step in range(1, self.steps + 1):
            pull = torch.sub(sparse, dual).mul_(rho).add_(target)
            dual.add_(sparse, alpha=1 - self.relaxation)
            resolvent.add_to(dual, pull, self.relaxation)  # B, and so what D projects
            look = step % self.every == 0 or step == self.steps
            if rough is not None and not look:
                sparse = hardshrink(dual, rough.level(dual))
                dual -= sparse
                continue
            kept = pattern.mask(dual.square(), weight)
            sparse = dual * kept
            dual -= sparse
            if not look:
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
            resolvent = _Resolvent(matrix, rho, len(target))
        return sparse, kept

    def _refit(
        self, start: Tensor, dense: Tensor, kept: Tensor, matrix: Tensor
    ) -> tuple[Tensor, float]:
        """Conjugate gradients for ``(x - dense) A * kept = 0``, all rows at once.

        Features have a unit diagonal, so this is preconditioned already. Every step lowers every
        row's error.

        Returns:
            x, and the objective.
        """
        x = start.clone()
        missing = dense - x
        residual = missing @ matrix
        lost = inner(missing, residual)
        residual *= kept
        direction = residual.clone()
        size = residual.square().sum(1, keepdim=True)
        for _ in range(self.refits):
            image = (direction @ matrix).mul_(kept)
            length = size / _nonzero((direction * image).sum(1, keepdim=True))
            gain = inner(length, size)
            x.addcmul_(length, direction)
            lost -= gain
            if gain <= self.tolerance * lost:
                break
            residual.addcmul_(length, image, value=-1)
            smaller = residual.square().sum(1, keepdim=True)
            direction.mul_(smaller / _nonzero(size)).add_(residual)
            size = smaller
        return x, lost


class _Resolvent:
    """Multiplies rows with (A + rho)⁻¹. Eigenvectors, which would give all of them, cost more."""

    def __init__(self, matrix: Tensor, rho: float, rows: int) -> None:
        """`rows` is how many there are to multiply."""
        # The least eigenvalue is rho or more, and the trace is the number of features.
        wide = matrix.double() if rho < 1e-3 else matrix.clone()
        wide.diagonal().add_(rho)
        factor, failed = lower_factor(wide)
        assert not failed
        # For a few rows, two triangular systems cost less than the inverse.
        self.inverse = rows >= len(matrix)
        self.matrix = (torch.cholesky_inverse(factor) if self.inverse else factor).to(matrix.dtype)

    def add_to(self, total: Tensor, rows: Tensor, scale: float) -> None:
        """``total += scale * rows (A + rho)⁻¹``."""
        if self.inverse:
            total.addmm_(rows, self.matrix, alpha=scale)
            return
        half = solve_triangular(self.matrix.T, rows, upper=True, left=False)
        total.add_(solve_triangular(self.matrix, half, upper=False, left=False), alpha=scale)


@dataclass(frozen=True, eq=False)
class _Rough:
    """Tells from a sample how large the largest entries of a matrix are.

    Attributes:
        places: of the sample, in the flat matrix.
        rank: in the sample, of the largest entry that goes.
    """

    places: Tensor
    rank: int

    def level(self, x: Tensor) -> float:
        """The size that about as many entries of x exceed as are kept."""
        return float(x.reshape(-1)[self.places].abs_().kthvalue(self.rank).values)


def _rough(x: Tensor, kept: Tensor, pattern: Pattern) -> _Rough | None:
    """The sample of a matrix like x; None where it wouldn't do, or save no time."""
    if not isinstance(pattern, Unstructured) or pattern.preserve or x.numel() <= 4 * SAMPLED:
        return None
    places = torch.arange(SAMPLED, device=x.device) * SCATTER % x.numel()
    rank = round((1 - float(kept.sum()) / kept.numel()) * SAMPLED)
    return _Rough(places, min(max(rank, 1), SAMPLED))


def _lost(x: Tensor, dense: Tensor, matrix: Tensor) -> float:
    """The objective: squared change of the output."""
    change = x - dense
    return inner(change, change @ matrix)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)
