"""Consumers: the weights that multiply by values which run along a structure's axis.

When a unit of a structure goes, the columns that its consumers have for it go too, and with them
all that the unit did. What a unit is worth, and how the rest can make up for it, is read there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes import Expr
from graphprune.axes.expr import IntArray
from graphprune.plan.units import NONE, owners, pair_index
from graphprune.streaming.core.layout import Layout
from graphprune.streaming.core.sites import Sites


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that reads the units of a structure.

    Attributes:
        parameter: its canonical name.
        group: position of its group in `Sites.groups`.
        units: int64 ``[parts, in]``: the unit that owns each column, ``outer unit * size + unit``
            where the structure is ragged within another; -1 for columns of no unit.
    """

    parameter: str
    group: int
    units: IntArray


def consumers(
    program: BaseProgram, structures: Iterable[Structure], sites: Sites
) -> dict[str, tuple[Consumer, ...]]:
    """Find the consumers of structures among the sites of a program.

    Args:
        program: the program.
        structures: those with an atom; layers have no consumers.
        sites: where weights are applied.

    Returns:
        Structure name to its consumers, in the order of the groups; to none where the axis meets
        no weight (queries and keys, which meet in a product of activations), or where a column
        belongs to several units.
    """
    layouts = {n: (g.index, g.layout(n)) for g in sites.groups for n in g.parameters}
    return {s.name: _of(program, s, layouts) for s in structures}


def _of(
    program: BaseProgram, structure: Structure, layouts: dict[str, tuple[int, Layout]]
) -> tuple[Consumer, ...]:
    found: list[Consumer] = []
    if structure.atom is None:
        return ()
    members = ((program.aliases.get(p, p), d) for p, d in structure.members)
    for parameter, dim in dict.fromkeys(members):
        if parameter not in layouts:
            continue
        group, layout = layouts[parameter]
        columns = input_positions(layout, program.parameters[parameter], dim)
        if columns is None:
            continue
        units = owning_units(program.axis(parameter, dim), structure)
        if units is None:
            return ()
        found.append(Consumer(parameter, group, units[columns]))
    return tuple(sorted(found, key=lambda c: c.group))


def input_positions(layout: Layout, shape: tuple[int, ...], dim: int) -> IntArray | None:
    """The index into one dimension of a weight that each of its columns has.

    Returns:
        int64 ``[parts, in]``, or None where the dimension isn't one that the weight sums over.
    """
    view = [1] * len(shape)
    view[dim] = shape[dim]
    matrices = layout.matrices(torch.arange(shape[dim]).view(view).expand(shape))
    columns = matrices[:, :1]
    if not bool((columns != columns[:, :, :1]).any()) or bool((matrices != columns).any()):
        return None
    return np.asarray(columns[:, 0].numpy(), dtype=np.int64)


def owning_units(e: Expr, structure: Structure) -> IntArray | None:
    """The unit of each position of an axis; None where some have several."""
    atom, outer = structure.atom, structure.within
    assert atom is not None
    rows = owners(e, atom)
    if (np.count_nonzero(rows != NONE, axis=0) > 1).any():
        return None
    if outer is None:
        return np.asarray(rows.max(axis=0, initial=NONE), dtype=np.int64)
    if (np.count_nonzero(owners(e, outer) != NONE, axis=0) > 1).any():
        return None
    return pair_index(e, outer, atom)
