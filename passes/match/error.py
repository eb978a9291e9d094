"""How far a block's result is from what is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.match.pairs import Pair
from graphprune.streaming import Matrix, Site
from graphprune.streaming.core.padding import Padding

_SMALLEST = 1e-6
"""Of the mean square of a stream: tokens that have less weigh no more."""


class Errors:
    """Squared errors of tokens, padding left out."""

    def __init__(self, program: Program, weigh: str) -> None:
        """Errors against what `program`, the dense model, computes."""
        self._padding = Padding(program)
        self._weigh = weigh

    def wanted(self, pair: Pair, target: Tensor) -> Tensor:
        """What a block is to compute, of the dense value."""
        for dim, kept in pair.kept.items():
            target = target.index_select(dim, torch.from_numpy(kept).to(target.device))
        return target

    def weights(self, pair: Pair, wanted: Tensor, valid: Mapping[str, Tensor]) -> Tensor:
        """What the squared error of each token counts: zero at padding; ``[tokens]``."""
        size = _rows(wanted, pair.features).square().sum(1)
        known = self._valid(pair, wanted, valid)
        if known is None:
            known = torch.ones_like(size, dtype=torch.bool)
        if self._weigh == "none":
            return known.to(size)
        smallest = _SMALLEST * size[known].mean() if known.any() else size.new_zeros(())
        weights = 1 / torch.maximum(size, smallest)
        return torch.where(known & weights.isfinite(), weights, 0)

    def _valid(self, pair: Pair, wanted: Tensor, valid: Mapping[str, Tensor]) -> Tensor | None:
        if all(bool(mask.all()) for mask in valid.values()):
            return None
        if len(pair.features) > 1:
            raise PlanError(
                "padding can't be told from tokens",
                where=pair.path,
                why="the block mixes the values of all tokens",
                hint="give samples without padding",
            )
        layout = Matrix(features=pair.features[0])
        site = Site(pair.path, pair.target, pair.target, pair.target, layout)
        return self._padding.rows(site, wanted, valid)


def error(found: Tensor, wanted: Tensor, features: Sequence[int], weights: Tensor) -> Tensor:
    """The weighed sum of squared errors over all tokens."""
    return (_rows(found - wanted, features).square().sum(1) * weights).sum()


def _rows(x: Tensor, features: Sequence[int]) -> Tensor:
    """``[tokens, features]``."""
    last = x.movedim(tuple(features), tuple(range(-len(features), 0)))
    return last.flatten(-len(features)).reshape(-1, last.shape[-len(features) :].numel())
