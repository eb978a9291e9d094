"""Damped Hessians and their factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.precision import exact

FIRST = 1e-6  # what an undamped matrix that can't be factorised gets
LARGE, PANEL = 1024, 192  # columns
LIMIT = 1.0  # damping beyond the mean of the diagonal: no longer the same problem


@dataclass(frozen=True, eq=False)
class Damped:
    """A Hessian that can be inverted: H + damping * mean * 1, dead features on their own.

    Attributes:
        matrix: [n, n]. A dead feature (its diagonal is zero) gets the mean of the live ones:
            anything else would depend on the scale of the activations.
        dead: [n], bool.
        mean: mean of the diagonal over the live features.
        damping: in units of `mean`, as used.
        wanted: in units of `mean`, as asked for.
    """

    matrix: Tensor
    dead: Tensor
    mean: float
    damping: float
    wanted: float

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say."""
        found = []
        if count := int(self.dead.sum()):
            found.append(f"{count} of {len(self.dead)} inputs are always zero")
        if self.damping > self.wanted:
            found.append(f"damping raised from {self.wanted:g} to {self.damping:g}")
        return tuple(found)


def damp(hessian: Tensor, damping: float) -> Damped:
    """Damp a Hessian in place.

    Args:
        hessian: [n, n], symmetric, positive semidefinite, with a live feature; it is overwritten.
        damping: in units of the mean of the live diagonal.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].double().mean())
    diagonal[dead] = mean
    diagonal += damping * mean
    return Damped(hessian, dead, mean, damping, damping)


def cholesky(damped: Damped) -> tuple[Tensor, Damped]:
    """Lower Cholesky factor; damping grows tenfold until there is one.

    A factor with a pivot that is rounding noise counts as none.

    Returns:
        The factor, and the matrix that it is of.

    Raises:
        CalibrationError: a damping of the size of the diagonal doesn't help either.
    """
    matrix, damping = damped.matrix, damped.damping
    noise = 4 * torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5
    while True:
        factor, failed = lower_factor(matrix)
        # A pivot is what the features before it don't explain of the diagonal entry.
        left = factor.diagonal().square() / matrix.diagonal()
        if not failed and float(left.min()) > noise:
            return factor, Damped(matrix, damped.dead, damped.mean, damping, damped.wanted)
        if damping >= LIMIT:
            raise CalibrationError(
                "the Hessian has no Cholesky factor, however it is damped",
                why=f"damping reached {damping:g} of the mean of its diagonal",
                hint="calibrate with more tokens, or factorise in float64",
            )
        more = min(max(10 * damping, FIRST), LIMIT)
        matrix = matrix.clone()
        matrix.diagonal().add_((more - damping) * damped.mean)
        damping = more


def lower_factor(matrix: Tensor) -> tuple[Tensor, bool]:
    """Lower Cholesky factor [n, n] of a matrix, and whether there is none.

    Panels of a large matrix are products, which keep a processor busier than LAPACK does.
    """
    if matrix.device.type != "cpu" or len(matrix) < LARGE:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, bool(info)
    lower = matrix.tril()
    for start in range(0, len(matrix), PANEL):
        panel = lower[start:, start : start + PANEL]
        before = lower[start:, :start]
        with exact():
            panel.addmm_(before, before[: panel.shape[1]].T, alpha=-1)
        block, info = torch.linalg.cholesky_ex(panel[: panel.shape[1]])
        if bool(info):
            return lower, True
        panel[: len(block)] = block
        rest = panel[len(block) :]
        rest.copy_(torch.linalg.solve_triangular(block.T, rest, upper=True, left=False))
    return lower, False


def solve_damped(hessian: Tensor, right: Tensor, damping: float) -> tuple[Tensor, Damped]:
    """Solve (H + damping * mean * 1) X = right.

    Args:
        hessian: [n, n]; overwritten.
        right: [n, k].
        damping: in units of the mean of the live diagonal; see `cholesky`.
    """
    factor, damped = cholesky(damp(hessian, damping))
    return torch.cholesky_solve(right, factor), damped
