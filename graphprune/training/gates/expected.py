"""The cost of a model that gates are expected to leave, as a polynomial in their chances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphprune.axes import Atom
from graphprune.ir.torch.program import Program
from graphprune.training.gates.gates import Gated

Resource = Literal["params", "macs", "bytes"]


@dataclass(frozen=True)
class Budget:
    """What a whole model may cost, however its structures share it (CoFi, Xia et al., 2022).

    Attributes:
        resource: what is counted.
        share: of the dense model's that is to go.
    """

    resource: Resource
    share: float


def saved_share(
    program: Program,
    gated: Mapping[str, Gated],
    opened: Callable[[str], Tensor],
    resource: Resource,
) -> Tensor:
    """The share of the dense cost that gates are expected to save.

    Each gate is open or closed by itself: the expected product of two axes is that of their
    expected sizes.

    Args:
        program: the dense program.
        gated: by name of the structure.
        opened: the chance of each unit of a structure to be open, ``[rows * size]``.
        resource: what is counted.
    """
    sizes: dict[Atom, Tensor] = {}
    stays: dict[str, Tensor] = {}
    for name, one in gated.items():
        chances = opened(name)
        if one.structure.atom is not None:
            sizes[one.structure.atom] = chances.sum() / one.rows
        for block in one.structure.blocks:
            for owner in (*block.nodes, *block.parameters):
                before = stays.get(owner)
                chance = chances[block.index]
                stays[owner] = chance if before is None else before * chance
    left, rest = program.costs.expected(sizes, stays, resource)
    dense = getattr(program.costs.total(), resource)
    saved: Tensor = 1 - (torch.as_tensor(left) + rest) / dense
    return saved
