"""What every solver returns, and what all of them do at their ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.pattern import NM, Pattern
from graphprune.solvers.precision import exact, finite, inner, true_count
from graphprune.solvers.quantise import Grid
from graphprune.solvers.statistic import Norms, SecondMoment, Statistic


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned weight.

    Attributes:
        weight: [out, in], in the type of the dense one; zero where the mask is False.
        mask: [out, in], bool, True for kept. A kept weight may be zero (rounding, quantisation).
        error: relative error of the layer's output, ``tr(D H Dᵀ) / tr(W H Wᵀ)`` with
            D = W - weight; None where there is no second moment.
        notes: what a report should say of this layer.
        permutation: [in], int64; the columns ``mask[:, permutation]`` have the n:m pattern. None
            where the columns have it as they stand.
        grid: the quantisation grid, if weights are quantised.
    """

    weight: Tensor
    mask: Tensor
    error: float | None
    notes: tuple[str, ...] = ()
    permutation: Tensor | None = None
    grid: Grid | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that the mask removes."""
        return 1 - true_count(self.mask) / max(self.mask.numel(), 1)


class Solver(Protocol):
    """Prunes one layer.

    One that needs less than the second moment of a layer's inputs may say so by an attribute
    ``statistic``, a class of `graphprune.solvers.statistic`; one that looks at no data has an
    attribute ``needs_data`` that is false.
    """

    def solve(self, weight: Tensor, statistic: Statistic, pattern: Pattern) -> Solved:
        """Prune one layer.

        Args:
            weight: [out, in], float; it is not changed.
            statistic: of its inputs.
            pattern: what the mask may be.
        """


def statistic_of(solver: Solver) -> type[Norms] | type[SecondMoment]:
    """The lightest statistic that a solver can work with: many weigh columns only."""
    found: type[Norms] | type[SecondMoment] = getattr(solver, "statistic", SecondMoment)
    return found


def innermost(solver: Solver) -> Solver:
    """What makes the first mask: the solver itself, or the one that it starts from (`first`)."""
    while (first := getattr(solver, "first", None)) is not None:
        solver = first
    return solver


def check(weight: Tensor, statistic: Statistic | None) -> None:
    """Refuse what no solver can work on.

    Raises:
        CalibrationError: the weight is no matrix, not finite, or not what the statistic is of.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise CalibrationError(
            f"a solver takes a floating-point matrix [out, in], not {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if statistic is not None and statistic.features != weight.shape[1]:
        raise CalibrationError(
            f"a statistic of {statistic.features} features does not fit a weight of "
            f"{weight.shape[1]} inputs"
        )
    if not finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise CalibrationError(f"{bad} of {weight.numel()} weights are NaN or infinite")


def second_moment(statistic: Statistic) -> SecondMoment:
    """The statistic of a solver that works with correlations.

    Raises:
        CalibrationError: only norms were collected.
    """
    if not isinstance(statistic, SecondMoment):
        raise CalibrationError("norms are not enough for this solver: it needs a second moment")
    return statistic


def widened(weight: Tensor) -> Tensor:
    """The weight in float32, or in float64 if that is what it has."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def masked(
    weight: Tensor,
    mask: Tensor,
    statistic: Statistic | None,
    pattern: Pattern,
    notes: tuple[str, ...] = (),
    *,
    updated: Tensor | None = None,
    permutation: Tensor | None = None,
    grid: Grid | None = None,
    lost: float | None = None,
) -> Solved:
    """Put a result together.

    Args:
        weight: [out, in], dense.
        mask: [out, in], bool, True for kept.
        statistic: for the error.
        pattern: for the notes.
        notes: further notes.
        updated: [out, in], new values of the kept weights; those of `weight` if None.
        permutation: see `Solved`.
        grid: see `Solved`.
        lost: see `relative_error`; of `updated`, which the type of `weight` may round.
    """
    source = weight.detach() if updated is None else updated
    # Both may be transposed, as yet. A product takes a third of `torch.where`'s time; the sum makes
    # its negative zeros positive.
    new = (source * mask).add_(0).to(weight.dtype).contiguous()
    mask = mask.contiguous()
    if isinstance(pattern, NM) and (tail := pattern.tail(weight.shape[1])):
        notes += (f"the last {tail} of {weight.shape[1]} columns stay dense: no whole group",)
    error = None
    if isinstance(statistic, SecondMoment) and not statistic.silent:
        rounded = new.dtype != source.dtype
        error = relative_error(weight, new, statistic, None if rounded else lost)
    return Solved(new, mask, error, notes, permutation, grid)


def relative_error(
    weight: Tensor, new: Tensor, statistic: SecondMoment, lost: float | None = None
) -> float:
    """``tr((W - W') H (W - W')ᵀ) / tr(W H Wᵀ)``; 0 where the dense layer's output is zero.

    Args:
        weight: [out, in], dense.
        new: [out, in].
        statistic: the second moment of the inputs; not silent.
        lost: the numerator, where it is known.
    """
    # Without an intermediate: with L the strict lower triangle, x H xᵀ = 2 x L xᵀ + x diag(H) xᵀ.
    scale = max(statistic.tokens, 1)
    lower = statistic.derived("lower", lambda: _halved(statistic.products))
    dense = widened(weight).to(lower.dtype)
    energy = 2 * _quadratic(dense, lower) / scale
    if lost is None:
        lost = 2 * _quadratic(dense - widened(new).to(lower.dtype), lower) / scale
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def _halved(products: Tensor) -> Tensor:
    """The lower triangle with half of the diagonal: its quadratic form is half of the whole."""
    lower = products.tril()
    lower.diagonal().mul_(0.5)
    return lower


def _quadratic(rows: Tensor, lower: Tensor) -> float:
    """Sum of x L xᵀ over the rows; strips of columns skip most of the zeros above the diagonal."""
    total = 0.0
    step = 256
    with exact():
        for start in range(0, rows.shape[1], step):
            part = rows[:, start:] @ lower[start:, start : start + step]
            total += inner(part, rows[:, start : start + step])
    return total
