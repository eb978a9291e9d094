"""Gates of structures, and the weights that they scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.plan.units import NONE, FloatArray
from graphprune.training.gates.places import Place


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


class Gates(Protocol):
    """The gates of some structures, whatever decides how open they are.

    Attributes:
        gated: by name of the structure.
        fixed: gates that take the place of what they are, by name; None for none.
    """

    gated: Mapping[str, Gated]
    fixed: Mapping[str, Tensor] | None

    def value(self, name: str) -> Tensor:
        """The gates of a structure in this pass, ``[rows * size]``."""


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
