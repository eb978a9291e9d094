"""DSnoT: exchange kept and pruned weights until a row's mean output is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import CalibrationError, RecipeError
from graphprune.passes.masks.magnitude import without_data
from graphprune.passes.masks.wanda import Wanda, wanda_scores
from graphprune.solvers.pattern import NM, Pattern
from graphprune.solvers.solved import Solved, Solver, masked, statistic_of, widened
from graphprune.solvers.statistic import Moments, Norms, Statistic


@dataclass(frozen=True)
class DSnoT:
    """Prune and grow on a first mask; no weight changes.

    What is pruned shifts a row's output by ``e = sum w_j mean(x_j)``. Each cycle grows, in every
    row, the pruned weight that lowers e most for the variance of its input, and prunes the kept
    one of least Wanda score whose sign lowers e too; each weight moves once. Zhang et al.,
    Dynamic Sparse No Training, 2023 (arXiv:2310.08915). Unlike there, a row stops at an exchange
    that would not bring e nearer to zero.

    For n:m, a weight is exchanged within its group, for the one of least score, whatever its sign.

    Attributes:
        first: what gives the first mask.
        cycles: most exchanges of a row.
        threshold: a row whose e, in size and over a window, is at most this is left.
        window: tokens that e is summed over for the threshold.
        power: of the variance that a growing weight's contribution is divided by.
    """

    needs_data: ClassVar[bool] = True
    first: Solver = field(default_factory=Wanda)
    cycles: int = 50
    threshold: float = 0.1
    window: int = 2048
    power: float = 1.0

    @property
    def statistic(self) -> type[Norms] | type[Moments]:
        """What is enough for the first mask and for the means."""
        return Norms if statistic_of(self.first) is Norms else Moments

    def __post_init__(self) -> None:
        if self.cycles < 0 or self.threshold < 0 or self.window < 1 or self.power < 0:
            raise RecipeError("DSnoT takes no negative cycles, threshold, window or power")

    def solve(
        self, weight: Tensor, statistic: Statistic, pattern: Pattern, mask: Tensor | None = None
    ) -> Solved:
        """Prune one layer.

        Args:
            weight: [out, in].
            statistic: of its inputs; if silent, the layer is pruned by magnitude.
            pattern: what the mask may be.
            mask: [out, in], bool, the first mask; it has the pattern. None: `first` gives it.

        Raises:
            CalibrationError: see `check`; or the statistic doesn't know the mean.
            RecipeError: the first mask is n:m for permuted columns only.
        """
        if (solved := without_data(weight, statistic, pattern, "row")) is not None:
            return solved
        if not isinstance(statistic, Norms | Moments):
            raise CalibrationError("a second moment alone is not enough for DSnoT: it needs means")
        start = self._first(weight, statistic, pattern) if mask is None else mask
        size = pattern.m if isinstance(pattern, NM) else 0
        kept = self._exchange(widened(weight), statistic, start, size)
        return masked(weight, kept, statistic, pattern)

    def _first(self, weight: Tensor, statistic: Statistic, pattern: Pattern) -> Tensor:
        solved = self.first.solve(weight, statistic, pattern)
        if solved.permutation is not None:
            raise RecipeError(
                "DSnoT exchanges weights within the groups of columns as they stand",
                why="the first mask is n:m for permuted columns",
                hint="leave permute off",
            )
        return solved.mask

    def _exchange(
        self, weight: Tensor, statistic: Norms | Moments, start: Tensor, m: int
    ) -> Tensor:
        rows = torch.arange(len(weight), device=weight.device)
        kept = start.clone()
        share = weight * statistic.means.to(weight)
        spread = statistic.variances.to(weight) ** self.power
        worth = share / torch.where(spread > 0, spread, torch.inf)  # constant inputs come last
        scores = wanda_scores(weight, statistic)
        # Zeros have nothing to give back, and existing ones stay.
        may_grow = ~start & (weight != 0)
        may_go = start.clone()
        if m:
            may_grow[:, weight.shape[1] // m * m :] = False
        error = torch.where(start, 0, share).sum(1)
        active = error.abs() * self.window > self.threshold
        for _ in range(self.cycles):
            sign = error.sign()[:, None]
            gain = torch.where(may_grow, worth * sign, -torch.inf)
            best, grown = gain.max(1)
            open_ = may_go if m else may_go & (share * sign < 0)
            if m:
                open_ = open_ & _group(grown, m, weight.shape[1])
            cost, gone = torch.where(open_, scores, torch.inf).min(1)
            after = error - share[rows, grown] + share[rows, gone]
            active &= (best > 0) & torch.isfinite(cost) & (after.abs() < error.abs())
            if not bool(active.any()):
                break
            at = rows[active]
            kept[at, grown[active]] = True
            kept[at, gone[active]] = False
            may_grow[at, grown[active]] = False
            may_go[at, gone[active]] = False
            error = torch.where(active, after, error)
            active &= error.abs() * self.window > self.threshold
        return kept


def _group(index: Tensor, m: int, columns: int) -> Tensor:
    """[rows, columns], bool: the columns of the group that each index is in."""
    return (torch.arange(columns, device=index.device) // m)[None] == (index // m)[:, None]
