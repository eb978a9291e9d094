"""Wanda: weights times the norms of what they multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphprune.passes.masks.magnitude import without_data
from graphprune.solvers.pattern import Group, Pattern, Unstructured
from graphprune.solvers.solved import Solved, masked, widened
from graphprune.solvers.statistic import Norms, Statistic


@dataclass(frozen=True)
class Wanda:
    """Remove the weights of least ``|w_ij| * ‖x_j‖`` of every output row; no weight changes.

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023
    (arXiv:2306.11695).

    Attributes:
        group: weights that compete: a row's, as in the paper, or a layer's.
        cumulative: of every row remove the lowest scores that add up to a share of the row's sum;
            the share, one for all rows, is searched until the layer has the sparsity. Rows then
            differ, and the count is exact up to `tolerance`. Unstructured only.
        tolerance: of the search, in units of sparsity.
    """

    needs_data: ClassVar[bool] = True
    statistic: ClassVar[type[Norms]] = Norms
    group: Group = "row"
    cumulative: bool = False
    tolerance: float = 1e-3

    def solve(self, weight: Tensor, statistic: Statistic, pattern: Pattern) -> Solved:
        """Prune one layer.

        Args:
            weight: [out, in].
            statistic: of its inputs; if silent, the layer is pruned by magnitude.
            pattern: what the mask may be.

        Raises:
            CalibrationError: see `check`.
        """
        if (solved := without_data(weight, statistic, pattern, self.group)) is not None:
            return solved
        scores = wanda_scores(weight, statistic)
        if self.cumulative and isinstance(pattern, Unstructured):
            mask = self._search(scores, weight, pattern)
        else:
            mask = pattern.mask(scores, weight, group=self.group)
        return masked(weight, mask, statistic, pattern)

    def _search(self, scores: Tensor, weight: Tensor, pattern: Unstructured) -> Tensor:
        """Bisect the share of the row sum that goes."""
        if pattern.preserve:
            scores = scores.masked_fill(weight == 0, 0)
        ordered, order = scores.double().sort(dim=1, stable=True)
        running = ordered.cumsum(1)
        running /= running[:, -1:].clamp_min(1e-300)
        wanted = pattern.count(scores.numel())
        low, high = 0.0, 1.0
        best = running < 0
        while high - low > 1e-9:
            share = (low + high) / 2
            gone = running <= share
            count = int(gone.sum())
            if abs(count - wanted) < abs(int(best.sum()) - wanted):
                best = gone
            if abs(count - wanted) <= self.tolerance * scores.numel():
                break
            low, high = (share, high) if count < wanted else (low, share)
        kept = (~best).new_empty(best.shape).scatter_(1, order, ~best)
        return kept & (weight != 0) if pattern.preserve else kept


def wanda_scores(weight: Tensor, statistic: Statistic) -> Tensor:
    """[out, in]: ``|w_ij| * ‖x_j‖``, the norm as a root mean square over the tokens."""
    wide = widened(weight)
    return wide.abs() * statistic.norms.to(wide)
