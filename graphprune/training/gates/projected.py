"""Gates that are open or closed: each step the best fill the budget, by scores that train.

A forward pass has the projection of the scores on the budget, a 1 or a 0 for each unit. Backward,
a score has the gradient of its gate, as if there were no projection between them (straight
through), so that a closed unit whose gate the loss would open rises until it takes another's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.training.gates.cut import kept
from graphprune.training.gates.gates import Gated

LEAST = 1e-3
"""The smallest scale of a unit that stays: one of 0 couldn't be told from a unit that goes."""


@dataclass
class ProjectedGates:
    """The gates of some structures.

    Attributes:
        gated: by name of the structure.
        scores: float32 ``[rows * size]`` by name, what trains while units are chosen.
        scales: the same, what trains of the units that stay once they are chosen.
        open: 1 or 0 for each unit, by name: the projection.
        chosen: whether the choice stands.
        fixed: gates that take the place of what they are, by name; None for none.
    """

    gated: Mapping[str, Gated]
    scores: dict[str, nn.Parameter]
    scales: dict[str, nn.Parameter]
    open: dict[str, Tensor]
    chosen: bool = False
    fixed: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, gated: Sequence[Gated], device: torch.device) -> ProjectedGates:
        """Gates whose scores are the ranks of the units' scores from 0 to 1, or all 0."""
        names = {one.structure.name: one for one in gated}
        scores = {name: _begun(one).to(device) for name, one in names.items()}
        return cls(
            names,
            {name: nn.Parameter(a) for name, a in scores.items()},
            {name: nn.Parameter(torch.ones_like(a)) for name, a in scores.items()},
            {name: torch.ones_like(a) for name, a in scores.items()},
        )

    def value(self, name: str) -> Tensor:
        """The gates of a structure in this pass, ``[rows * size]``."""
        if self.fixed is not None:
            return self.fixed[name]
        free = self.gated[name].free.to(self.open[name].device)
        if self.chosen:
            return torch.where(free, self.open[name] * self.scales[name], 1.0)
        a = self.scores[name]
        return torch.where(free, self.open[name] + (a - a.detach()), 1.0)

    @torch.no_grad()
    def project(self, counts: Mapping[str, int]) -> None:
        """Open the units with the highest scores.

        Args:
            counts: structure to how many units of each row stay.
        """
        for name, one in self.gated.items():
            where = self.ranking(name)
            found = torch.zeros(where.shape)
            for row, scores in enumerate(where):
                ties = None if one.scores is None else one.scores[row]
                found[row, list(kept(scores, counts[name], ties))] = 1.0
            self.open[name].copy_(found.flatten())

    def ranking(self, name: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """The scores of units, ``[rows, size]``; infinite for those that have to stay."""
        one = self.gated[name]
        a = self.scores[name].detach().double().cpu()
        wide = torch.where(one.free, a, torch.inf).view(one.rows, one.structure.size)
        return wide.numpy()

    @torch.no_grad()
    def settled(self) -> dict[str, Tensor]:
        """The gates as they are now, float64."""
        found = {}
        for name, one in self.gated.items():
            z = self.open[name].double() * self.scales[name].double()
            found[name] = torch.where(one.free, z.cpu(), 1.0)
        return found

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep scales above 0: activations between a gate and its weight may need their sign."""
        for scale in self.scales.values():
            scale.clamp_(min=LEAST)


def _begun(one: Gated) -> Tensor:
    if one.scores is None:
        return torch.zeros(one.rows * one.structure.size)
    ranks = np.argsort(np.argsort(one.scores, axis=-1, kind="stable"), axis=-1)
    return torch.from_numpy(ranks / max(1, one.structure.size - 1)).flatten().float()
