"""Gates that are learned by noise: their locations, and what is drawn of them in each pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.training.core.order import generator
from graphprune.training.gates.gates import Gated
from graphprune.training.gates.hard_concrete import (
    LIMIT,
    clamp,
    open_probability,
    sampled,
    settled,
)
from graphprune.training.model.adapters import Draw

_OPEN = 1e-6
"""A gate that is open, and lets next to nothing through."""


@dataclass
class ConcreteGates:
    """Gates that are drawn from hard concrete distributions.

    Attributes:
        gated: by name of the structure.
        locations: float32 ``[rows * size]`` by name, what trains.
        draw: what the noise depends on; without a key there is none.
        fixed: gates that take the place of the drawn ones, by name; None for none.
    """

    gated: Mapping[str, Gated]
    locations: dict[str, nn.Parameter]
    draw: Draw
    fixed: Mapping[str, Tensor] | None = None
    _known: tuple[object, dict[str, Tensor]] = (None, {})

    def value(self, name: str) -> Tensor:
        """The gates of a structure in this pass, ``[rows * size]``."""
        if self.fixed is not None:
            return self.fixed[name]
        if self.draw.key is None:
            return self._whole(name, quiet(self.locations[name].detach(), self.gated[name].free))
        if self._known[0] != self.draw.key:
            self._known = (self.draw.key, {})
        if name not in self._known[1]:
            a = self.locations[name]
            u = torch.rand(a.shape, generator=generator("gates", name, *self.draw.key))
            z = self._enough(name, sampled(a, u.to(a.device)))
            self._known[1][name] = self._whole(name, z)
        return self._known[1][name]

    def chances(self, name: str) -> Tensor:
        """The chance of each unit of a structure to have an open gate, ``[rows * size]``."""
        return self._whole(name, open_probability(self.locations[name]))

    def closed_share(self, name: str) -> Tensor:
        """The expected share of the gates of units that may go that are 0."""
        a = self.locations[name]
        return 1 - open_probability(a[self.gated[name].free.to(a.device)]).mean()

    def clamp(self) -> None:
        """Keep all locations where they have gradients."""
        for a in self.locations.values():
            clamp(a)

    def _enough(self, name: str, z: Tensor) -> Tensor:
        """Gates of which as many are open as the model needs: a router picks some experts."""
        one = self.gated[name]
        need, wide = one.structure.minimum, z.view(one.rows, -1)
        if need <= 1 or bool(((wide > 0).sum(1) >= need).all()):
            return z
        a = self.locations[name].detach().view(one.rows, -1)
        best = a.argsort(dim=1, descending=True, stable=True)[:, :need]
        needed = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, best, True)
        return torch.where(needed, wide.clamp_min(_OPEN), wide).flatten()

    def _whole(self, name: str, z: Tensor) -> Tensor:
        """Gates with a 1 for what has to stay."""
        return torch.where(self.gated[name].free.to(z.device), z, 1.0)


def quiet(a: Tensor, free: Tensor) -> Tensor:
    """Gates without noise, of which as many are 0 as are expected to be."""
    z = settled(a)
    among = torch.where(free.to(a.device), a, torch.inf)
    closed = round(float((1 - open_probability(a[free.to(a.device)])).sum()))
    order = among.argsort(stable=True)[:closed]
    return z.index_fill(0, order, 0.0)


def begun(gated: Sequence[Gated], seed: int, draw: Draw, *, by_score: bool) -> ConcreteGates:
    """Gates at the start.

    Args:
        gated: structures with different names.
        seed: of the start without scores.
        draw: what the noise of a pass depends on.
        by_score: whether units begin at places from 1 to the most open one in the order of their
            scores, so that training has only some of them to exchange; otherwise all begin open.
    """
    locations = {}
    for one in gated:
        name, size = one.structure.name, one.structure.size
        if by_score and one.scores is not None:
            ranks = np.argsort(np.argsort(one.scores, axis=-1, kind="stable"), axis=-1)
            a = torch.from_numpy(1 + ranks / max(1, size - 1) * (LIMIT - 1)).flatten().float()
        else:
            drawn = generator("gates at the start", seed, name)
            a = 5 + 0.01 * torch.randn(one.rows * size, generator=drawn)
        clamp(a)
        locations[name] = nn.Parameter(a)
    return ConcreteGates({one.structure.name: one for one in gated}, locations, draw)
