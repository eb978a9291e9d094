"""RIA: relative importance and activations, with channel permutation for n:m."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.passes.masks.magnitude import without_data
from graphprune.solvers.pattern import NM, Group, Pattern
from graphprune.solvers.permute import deal, exchange
from graphprune.solvers.solved import Solved, masked, widened
from graphprune.solvers.statistic import Norms, Statistic


@dataclass(frozen=True)
class RIA:
    """Remove the weights of least ``(|w| / row sum + |w| / column sum) * ‖x_j‖^power``.

    The sums are of ``|w|``: a weight counts by its share in its output and in its input, so that
    no row or column is emptied. No weight changes. Zhang et al., Plug-and-Play: An Efficient
    Post-training Pruning Method for Large Language Models, ICLR 2024.

    Attributes:
        power: exponent of the norm.
        group: weights that compete: a layer's, or a row's.
        permute: for n:m, order the input columns first so that groups lose less: columns are dealt
            to groups by their importance, then exchanged by linear assignment. The mask has the
            pattern only in that order, which `Solved.permutation` is: the caller has to permute
            the layer's inputs. `graphprune.sparsify` reorders the channels of the model where
            that is possible, and leaves the others; see `graphprune.passes.masks.reordering`.
    """

    needs_data: ClassVar[bool] = True
    statistic: ClassVar[type[Norms]] = Norms
    power: float = 0.5
    group: Group = "layer"
    permute: bool = False

    def __post_init__(self) -> None:
        if self.power < 0:
            raise RecipeError(f"an exponent of {self.power} favours weak inputs", where="RIA")

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
        scores = ria_scores(weight, statistic, self.power)
        if self.permute and isinstance(pattern, NM):
            return self._permuted(weight, scores, statistic, pattern)
        return masked(weight, pattern.mask(scores, weight, group=self.group), statistic, pattern)

    def _permuted(
        self, weight: Tensor, scores: Tensor, statistic: Statistic, pattern: NM
    ) -> Solved:
        order, gain = best_order(scores, weight, pattern)
        if order is None:
            return masked(weight, pattern.mask(scores, weight), statistic, pattern)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        mask[:, order] = pattern.mask(scores[:, order], weight[:, order])
        solved = masked(weight, mask, statistic, pattern)
        notes = (*solved.notes, f"permuted columns keep {gain:.1%} more score")
        return replace(solved, permutation=order, notes=notes)


def best_order(scores: Tensor, weight: Tensor, pattern: NM) -> tuple[Tensor | None, float]:
    """The order of columns under which a mask keeps the most: as they stand, dealt, or exchanged.

    Args:
        scores: [out, in].
        weight: [out, in].
        pattern: of the mask.

    Returns:
        [in], int64, or None for the order that they have; the share of score that it adds.
    """
    if pattern.preserve:
        scores = scores.masked_fill(weight == 0, 0)
    dealt = deal(scores, pattern.m)
    orders = [
        torch.arange(weight.shape[1], device=weight.device),
        dealt,
        exchange(scores, dealt, pattern.n, pattern.m),
    ]
    masks = [pattern.mask(scores[:, o], weight[:, o]) for o in orders]
    kept = [float((scores[:, o] * m).sum()) for o, m in zip(orders, masks, strict=True)]
    best = max(range(3), key=kept.__getitem__)
    gain = kept[best] / max(kept[0], 1e-300) - 1
    return (orders[best] if best else None), gain


def ria_scores(weight: Tensor, statistic: Statistic, power: float = 0.5) -> Tensor:
    """[out, in]: a weight's share in its row and in its column, times ``‖x_j‖^power``."""
    size = widened(weight).abs()
    rows, columns = size.sum(1, keepdim=True), size.sum(0, keepdim=True)
    one = torch.ones((), dtype=size.dtype, device=size.device)
    shares = size / torch.where(rows > 0, rows, one)
    shares += size / torch.where(columns > 0, columns, one)
    return shares * statistic.norms.to(size) ** power
