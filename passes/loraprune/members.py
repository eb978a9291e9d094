"""From elements of weights to the units that they belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.plan.units import FloatArray, owners, pair_index, sum_by


@dataclass(frozen=True)
class Member:
    """A dimension of a weight that a structure's units lie in.

    Attributes:
        structure: its name.
        dim: the dimension.
        index: ``[k, size of the dimension]``: the units that own each position, or -1; of a
            structure that is ragged within another, ``outer unit * size + unit``.
        shape: ``[size]``, or ``[outer size, size]``.
    """

    structure: str
    dim: int
    index: IntArray
    shape: tuple[int, ...]

    def shares(self, sums: FloatArray) -> FloatArray:
        """What each unit has of a weight's importance, of a vector of length 1 over all units.

        Args:
            sums: over all other dimensions, for each position of this one.
        """
        found = sum_by(sums, self.index, int(np.prod(self.shape))).reshape(self.shape)
        length = float(np.linalg.norm(found))
        return found / length if length else found


def shape_of(structure: Structure) -> tuple[int, ...]:
    """``[size]``; ``[outer size, size]`` of a structure that is ragged within another."""
    outer = (structure.within.size,) if structure.within else ()
    return (*outer, structure.size)


def members_of(
    program: BaseProgram, structures: Sequence[Structure], weights: Collection[str]
) -> dict[str, tuple[Member, ...]]:
    """The members of structures in some weights.

    Args:
        program: the program.
        structures: with axes of their own, not layers.
        weights: canonical names.

    Returns:
        Canonical name to members, of weights that have any.
    """
    found: Mapping[str, list[Member]] = defaultdict(list)
    for structure in structures:
        atom, outer = structure.atom, structure.within
        assert atom is not None
        known = ((program.aliases.get(p, p), d) for p, d in structure.members)
        for parameter, dim in dict.fromkeys(known):
            if parameter not in weights:
                continue
            e = program.axis(parameter, dim)
            index = owners(e, atom) if outer is None else pair_index(e, outer, atom)[None]
            member = Member(structure.name, dim, index, shape_of(structure))
            found[parameter].append(member)
    return {name: tuple(members) for name, members in found.items()}
