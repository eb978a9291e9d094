"""Closed-form refit of a layer that lost some of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.factor import solve_damped
from graphprune.solvers.solved import Solved, check, relative_error
from graphprune.solvers.statistic import SecondMoment

_STRONGER = (1e-2, 1e-1, 1.0, 10.0)
_OVERFITTED = 1.5
"""Error on samples that a fit hasn't seen, over that on those it has, from which on it damps."""


@dataclass(frozen=True)
class Reconstruct:
    """Least squares of the dense output on the kept inputs.

    Minimises ``tr((W - W') H (W - W')ᵀ) + damping * mean(diag H) * ‖W' - W‖²`` over the kept
    columns K; the others are zero. That is ``W'_K = (W H[:,K] + d W_K) (H[K,K] + d)⁻¹``, in
    float64: the damping draws to the dense weights and not to zero. It is the optimal update of
    OBS (Hassibi and Stork, 1992) for a given set of inputs.

    Attributes:
        damping: in units of the mean of the diagonal of H over the inputs that are not always
            zero. It grows tenfold where H can't be factorised.
    """

    damping: float = 1e-4

    def solve(self, weight: Tensor, statistic: SecondMoment, kept: Tensor) -> Solved:
        """Refit one layer.

        Args:
            weight: [out, in], dense.
            statistic: of the inputs that it reads, in the dense model or in what has become of
                it. If it is silent, kept columns stay as they are.
            kept: [k] indices or [in] bool: the inputs that stay.

        Returns:
            The weight at full size, zero in the removed columns.

        Raises:
            CalibrationError: see `check` and `cholesky`; or `kept` does not select inputs.
        """
        new, notes = self.fit(weight, statistic, kept)
        mask = _columns(kept, weight.shape[1], weight.device).expand(weight.shape).clone()
        error = None if statistic.silent else relative_error(weight, new, statistic)
        return Solved(new, mask, error, notes)

    def fit(
        self, weight: Tensor, statistic: SecondMoment, kept: Tensor
    ) -> tuple[Tensor, tuple[str, ...]]:
        """The weight and the notes of `solve`, without the error."""
        check(weight, statistic)
        mask = _columns(kept, weight.shape[1], weight.device)
        new = torch.where(mask, weight.detach(), 0)
        if statistic.silent:
            return new, ("no input came: nothing to fit to",)
        if mask.all() or not mask.any():
            return new, ()
        hessian = statistic.hessian.double()
        index = mask.nonzero().squeeze(1)
        rows = hessian[index]  # [k, in]
        gone = weight.detach().double()[:, ~mask]
        # W'_K - W_K = W_gone H[gone,K] (H[K,K] + d)⁻¹: the same, without a subtraction of large
        # products. A dead input has a zero row here, and stays.
        right = rows[:, ~mask] @ gone.T
        if not bool(rows[:, index].diagonal().any()):
            return new, ()
        change, damped = solve_damped(rows[:, index].contiguous(), right, self.damping)
        new[:, index] = (weight.detach().double()[:, index] + change.T).to(weight.dtype)
        return new, damped.notes

    def tuned(
        self, weight: Tensor, halves: Sequence[SecondMoment], kept: Tensor
    ) -> tuple[Reconstruct, list[Tensor]]:
        """The same with more damping, where few samples ask for that.

        With few tokens a fit learns what these have by chance. Where a fit to one half of them errs
        much more on the other half, it gets the damping that errs least there.

        Args:
            weight: [out, in], dense.
            halves: statistics of two disjoint sets of samples, not silent.
            kept: see `solve`.

        Returns:
            It, and the weight as fitted to each half.
        """

        def fitted(refit: Reconstruct) -> list[Tensor]:
            return [refit.fit(weight, half, kept)[0] for half in halves]

        def error(found: Sequence[Tensor], on: Sequence[SecondMoment]) -> float:
            return sum(relative_error(weight, f, half) for f, half in zip(found, on, strict=True))

        best, result = self, fitted(self)
        least = error(result, halves[::-1])
        if least <= _OVERFITTED * error(result, halves):
            return best, result
        for damping in _STRONGER:
            if damping > self.damping:
                other = replace(self, damping=damping)
                found = fitted(other)
                if (lost := error(found, halves[::-1])) < least:
                    best, result, least = other, found, lost
        return best, result


def _columns(kept: Tensor, count: int, device: torch.device) -> Tensor:
    """A bool mask of the kept inputs."""
    kept = kept.to(device)
    if kept.dtype == torch.bool and kept.shape == (count,):
        return kept
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    if kept.dtype == torch.bool or kept.is_floating_point() or kept.ndim != 1:
        raise CalibrationError(f"kept inputs are indices or a mask of {count}, not {kept.dtype}")
    if kept.numel():
        if int(kept.min()) < 0 or int(kept.max()) >= count:
            raise CalibrationError(f"kept inputs reach beyond the {count} there are")
        mask[kept.long()] = True
    return mask
