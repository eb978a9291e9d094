"""SparseGPT: optimal brain surgery for all rows at once, column by column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.passes.masks.magnitude import without_data
from graphprune.solvers.factor import Damped, cholesky, damp
from graphprune.solvers.pattern import NM, Given, Pattern, Unstructured, lowest
from graphprune.solvers.precision import exact
from graphprune.solvers.quantise import Grid, grid
from graphprune.solvers.solved import Solved, masked, second_moment, widened
from graphprune.solvers.statistic import SecondMoment, Statistic

Factored: TypeAlias = tuple[Tensor, Tensor, Damped]
"""Unit lower factor, its diagonal, and the matrix that it is of."""


@dataclass(frozen=True)
class SparseGPT:
    """Prune and update a layer so that its output changes least.

    Columns are settled from left to right. What a column loses (pruned, rounded) is made up for by
    the columns to its right, with the inverse Hessian of those. Frantar and Alistarh, SparseGPT,
    2023 (arXiv:2301.00774).

    With H = Tᵀ T, T lower triangular, the value of column j after the losses d_i = w_i - q_i of
    the columns before it is ``w_j + sum_i d_i T_ji / T_jj``, and ``1 / T_jj²`` is the diagonal of
    the inverse Hessian of the columns from j on. So no inverse is needed, and sums over earlier
    columns can be taken as late as one likes: in one product per block.

    Attributes:
        damping: added to the diagonal of H, in units of its mean over the inputs that are not
            always zero. It grows tenfold where H can't be factorised.
        mask_block: columns whose mask is chosen together, over all rows, when the first of them is
            reached. Rounded up to a multiple of m for n:m, where each group is chosen when its
            first column is reached.
        lazy_block: columns between two products; a matter of speed and rounding only. At most
            `mask_block` where masks are chosen, rounded up to a multiple of m for n:m.
        bits: quantise what stays to this many bits, 2 to 8, on a grid per row that the dense
            weights span; later columns make up for the rounding too. None: don't.
        double: factorise in float64; float32 halves the memory this takes.
    """

    needs_data: ClassVar[bool] = True
    damping: float = 0.01
    mask_block: int = 128
    lazy_block: int = 32
    bits: int | None = None
    double: bool = True

    def __post_init__(self) -> None:
        if self.mask_block < 1 or self.lazy_block < 1 or not 0 <= self.damping <= 1:
            raise RecipeError("SparseGPT takes blocks of at least 1 and a damping from 0 to 1")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise RecipeError("SparseGPT rounds to 2 to 8 bits", why=f"bits is {self.bits}")

    def solve(self, weight: Tensor, statistic: Statistic, pattern: Pattern) -> Solved:
        """Prune one layer.

        Args:
            weight: [out, in]; solved in float32, or in float64 if that is its type.
            statistic: second moment of its inputs; if silent, the layer is pruned by magnitude.
                Its factor is kept for the next layer that reads the same value.
            pattern: what the mask may be.

        Raises:
            CalibrationError: see `check` and `cholesky`.
        """
        if (solved := without_data(weight, statistic, pattern)) is not None:
            return self._rounded(solved, weight, statistic, pattern) if self.bits else solved
        statistic = second_moment(statistic)
        columns = widened(weight).T.contiguous()
        lattice = grid(columns.T, self.bits) if self.bits else None
        if lattice is None and _keeps_all(pattern, weight):
            return masked(weight, torch.ones_like(weight, dtype=torch.bool), statistic, pattern)
        key = ("sparsegpt", self.damping, self.double, columns.dtype)
        factor, diagonal, damped = statistic.derived(
            key, lambda: self._factorise(statistic, columns.dtype)
        )
        choose = _Choice(pattern, weight, diagonal.masked_fill(damped.dead, 0), self.mask_block)
        with exact():
            new, kept, missed = self._sweep(columns, factor, choose, lattice)
        notes = damped.notes
        if statistic.tokens < weight.shape[1]:
            notes += (f"{statistic.tokens} tokens for {weight.shape[1]} inputs",)
        lost = _lost(missed, columns - new, diagonal, damped)
        return masked(
            weight, kept.T, statistic, pattern, notes, updated=new.T, grid=lattice, lost=lost
        )

    def _factorise(self, statistic: SecondMoment, dtype: torch.dtype) -> Factored:
        """T of H = Tᵀ T, with its rows divided by their diagonal."""
        wide = torch.float64 if self.double else dtype
        # The Cholesky factor of H backwards is T backwards and transposed. It is computed from the
        # lower triangle, which comes from that of the products.
        backwards = statistic.products.T.flip(0, 1).to(wide).div_(max(statistic.tokens, 1))
        lower, damped = cholesky(damp(backwards, self.damping))
        # The matrix is not kept: in a wide layer nothing weighs more.
        damped = replace(damped, matrix=lower.new_empty(0), dead=damped.dead.flip(0))
        del backwards
        factor = lower.T.flip(0, 1)
        del lower
        diagonal = factor.diagonal().clone()
        factor /= diagonal[:, None]
        return factor.to(dtype), diagonal.to(dtype), damped

    def _sweep(
        self, dense: Tensor, factor: Tensor, choose: _Choice, lattice: Grid | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Settle the columns in order. Everything is transposed: a column is a row of memory.

        Returns:
            [in, out] settled values and, bool, which are kept; [in], float64, for every column the
            sum of squares of what it would have been without its own loss, less what it is.
        """
        count = len(dense)
        new, lost = torch.empty_like(dense), torch.empty_like(dense)
        kept = torch.empty(dense.shape, dtype=torch.bool, device=dense.device)
        missed = torch.empty(count, dtype=torch.float64, device=dense.device)
        for start in range(0, count, step := self._outer(choose.pattern)):
            end = min(start + step, count)
            block = factor[start:end, start:end]
            owed = factor[start:end, :start] @ lost[:start]  # what earlier columns ask of these
            if not isinstance(choose.pattern, NM):
                values = dense[start:end] + _forward(block, owed)
                kept[start:end] = choose.block(start, end, values)
            for a in range(0, end - start, width := self._inner(choose.pattern)):
                b = min(a + width, end - start)
                here = slice(start + a, start + b)
                if a:
                    owed[a:b].addmm_(block[a:b, :a], lost[start : start + a])
                if isinstance(choose.pattern, NM):
                    values = dense[here] + _forward(block[a:b, a:b], owed[a:b])
                    kept[here] = choose.block(start + a, start + b, values)
                owed[a:b] += dense[here]
                left = kept[here].to(dense.dtype)  # here once, and not at every column
                _settle(
                    dense[here], owed[a:b], block[a:b, a:b], left, new[here], lost[here], lattice
                )
                missed[here] = (owed[a:b] - new[here]).square_().sum(1)
        return new, kept, missed

    def _outer(self, pattern: Pattern) -> int:
        if isinstance(pattern, Given):
            return max(self.mask_block, self.lazy_block)
        return _multiple(self.mask_block, pattern.m if isinstance(pattern, NM) else 1)

    def _inner(self, pattern: Pattern) -> int:
        return pattern.m if isinstance(pattern, NM) else self.lazy_block

    def _rounded(
        self, solved: Solved, weight: Tensor, statistic: Statistic, pattern: Pattern
    ) -> Solved:
        """Round to nearest where there is nothing to make up with."""
        assert self.bits
        lattice = grid(widened(weight), self.bits)
        new = lattice.round(widened(solved.weight))
        return masked(
            weight, solved.mask, statistic, pattern, solved.notes[:1], updated=new, grid=lattice
        )


def _settle(
    dense: Tensor,
    base: Tensor,
    factor: Tensor,
    kept: Tensor,
    new: Tensor,
    lost: Tensor,
    lattice: Grid | None,
) -> None:
    """Settle a few columns one by one.

    Args:
        dense: [k, out], their dense values.
        base: [k, out], their values after the losses of all columns before these; then those
            that they were settled from.
        factor: [k, k], their part of the factor.
        kept: [k, out], 1 for kept weights and 0 for others.
        new: [k, out], filled with the settled values.
        lost: [k, out], filled with the dense values less the settled ones.
        lattice: to round to.
    """
    before = lost.T
    # Thousands of small steps: views are made at once, not column by column.
    columns = zip(*(x.unbind() for x in (dense, base, factor, kept, new, lost)), strict=True)
    for j, (full, value, row, left, settled, gone) in enumerate(columns):
        if j:
            value.addmv_(before[:, :j], row[:j])
        if lattice is None:
            torch.addcmul(full, value, left, value=-1, out=gone)
        else:
            torch.mul(lattice.round_column(value), left, out=settled)
            torch.sub(full, settled, out=gone)
    if lattice is None:
        torch.mul(base, kept, out=new)


def _lost(missed: Tensor, gone: Tensor, diagonal: Tensor, damped: Damped) -> float:
    """tr(D H Dᵀ) of D = W - W', from what the sweep knows of that of the damped H.

    Args:
        missed: [in], see `SparseGPT._sweep`.
        gone: [in, out], D transposed.
        diagonal: [in], T_jj.
        damped: what was factorised.
    """
    added = (damped.dead.double() + damped.damping) * damped.mean
    squares = gone.square().sum(1).double()
    return float(missed @ diagonal.double().square() - squares @ added)


def _forward(factor: Tensor, owed: Tensor) -> Tensor:
    """What columns are now, before any of them is settled: a triangular solve."""
    now: Tensor = torch.linalg.solve_triangular(factor, owed, upper=False, unitriangular=True)
    return now


@dataclass(frozen=True, eq=False)
class _Choice:
    """Chooses the mask of a block of columns from their values and the inverse Hessian's diagonal.

    Attributes:
        pattern: what the mask may be.
        weight: [out, in], dense.
        diagonal: [in], T_jj, zero for dead inputs: they cost nothing and go first.
        step: columns of a block of an unstructured mask.
    """

    pattern: Pattern
    weight: Tensor
    diagonal: Tensor
    step: int

    @cached_property
    def _shares(self) -> dict[int, int]:
        """Weights that go in the block that starts at a column."""
        assert isinstance(self.pattern, Unstructured)
        starts = range(0, self.weight.shape[1], self.step)
        return dict(zip(starts, self.pattern.shares(self.weight, starts), strict=True))

    def block(self, start: int, end: int, values: Tensor) -> Tensor:
        """[end - start, out], bool, True for kept; `values` are [end - start, out]."""
        weight = self.weight[:, start:end]
        if isinstance(self.pattern, Given):
            return self.pattern.mask(self.weight, self.weight)[:, start:end].T
        scores = (values * self.diagonal[start:end, None]).abs_().T
        if isinstance(self.pattern, NM):
            return self.pattern.mask(scores.contiguous(), weight).T
        fixed = (weight == 0).reshape(1, -1) if self.pattern.preserve else None
        gone = lowest(scores.reshape(1, -1), self._shares[start], fixed)
        return ~gone.reshape(scores.shape).T


def _keeps_all(pattern: Pattern, weight: Tensor) -> bool:
    """Whether no weight goes: then none may change either."""
    if isinstance(pattern, Unstructured):
        return pattern.count(weight.numel()) == 0 and not pattern.preserve
    if isinstance(pattern, NM):
        return pattern.tail(weight.shape[1]) == weight.shape[1] and not pattern.preserve
    return bool(pattern.mask(weight, weight).all())


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
