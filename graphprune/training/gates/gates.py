"""Gates of structures: their locations, the noise of each pass, and the weights that they scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.plan.units import NONE, FloatArray
from graphprune.training.core.order import generator
from graphprune.training.gates.hard_concrete import (
    LIMIT,
    clamp,
    open_probability,
    sampled,
    settled,
)
from graphprune.training.gates.places import Place
from graphprune.training.model.adapters import Draw


@dataclass(frozen=True, eq=False)
class Gated:
    """A structure whose units have gates.

    Attributes:
        structure: the structure.
        rows: 1; of a ragged structure the units of the axis around it, which have gates each.
        count: units that are to stay of each row.
        removable: ``[size]``, the units that may go; the others have a gate of 1.
        scores: ``[rows, size]``, what decides between gates that are equally open; None for the
            order of the units.
    """

    structure: Structure
    rows: int
    count: int
    removable: IntArray
    scores: FloatArray | None = None

    @property
    def free(self) -> Tensor:
        """Bool ``[rows * size]``: the units that may go."""
        found = torch.zeros(self.rows, self.structure.size, dtype=torch.bool)
        found[:, torch.from_numpy(self.removable)] = True
        return found.flatten()

    @property
    def target(self) -> float:
        """The share of the units that may go that is to go."""
        return (self.structure.size - self.count) / len(self.removable)


@dataclass
class Gates:
    """The gates of some structures.

    Attributes:
        gated: by name of the structure.
        locations: float32 ``[rows * size]`` by name, what trains.
        draw: what the noise depends on; without a key there is none.
        fixed: gates that take the place of the drawn ones, by name; None for none.
        seed: of the start.
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
            self._known[1][name] = self._whole(name, sampled(a, u.to(a.device)))
        return self._known[1][name]

    def closed_share(self, name: str) -> Tensor:
        """The expected share of the gates of units that may go that are 0."""
        a = self.locations[name]
        return 1 - open_probability(a[self.gated[name].free.to(a.device)]).mean()

    def clamp(self) -> None:
        """Keep all locations where they have gradients."""
        for a in self.locations.values():
            clamp(a)

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


def begun(gated: Sequence[Gated], seed: int, draw: Draw, *, by_score: bool) -> Gates:
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
    return Gates({one.structure.name: one for one in gated}, locations, draw)


class Gating(nn.Module):
    """A parametrization: a weight times the gates of its places."""

    def __init__(self, gates: Gates, places: Sequence[Place], weight: Tensor) -> None:
        super().__init__()
        self._gates = gates
        self._places = [(p.structure, p.dim, p.offset, torch.as_tensor(p.units)) for p in places]
        self._rank = weight.dim()

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight, in its own dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            for structure, dim, offset, units in self._places:
                factor = spread(self._gates.value(structure), units.to(weight.device))
                if dim is not None:
                    factor = factor.view([-1 if i == dim else 1 for i in range(self._rank)])
                weight = scaled(weight, factor.to(weight.dtype), offset)
        return weight


def spread(z: Tensor, units: Tensor) -> Tensor:
    """The gate of each position; 1 where it has none."""
    return torch.where(units == NONE, 1.0, z[units.clamp_min(0)])


def scaled(weight: Tensor, factor: Tensor, offset: float) -> Tensor:
    """A weight so that it and what is added to it are `factor` times as large together."""
    return (weight + offset) * factor - offset if offset else weight * factor


@torch.no_grad()
def folded(weight: Tensor, places: Sequence[Place], values: Mapping[str, Tensor]) -> Tensor:
    """A weight with gates multiplied in, computed in float64.

    Args:
        weight: of any floating dtype.
        places: on it.
        values: gates by structure.
    """
    result = weight.double()
    for place in places:
        factor = spread(values[place.structure].double(), torch.as_tensor(place.units))
        if place.dim is not None:
            factor = factor.view([-1 if i == place.dim else 1 for i in range(weight.dim())])
        result = scaled(result, factor, place.offset)
    return result.to(weight.dtype)
