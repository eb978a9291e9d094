"""Which units have gone, and what that makes of weights and of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.passes.selection.levers import round_half_up
from graphprune.plan.kept import rows_of
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray

Gone: TypeAlias = npt.NDArray[np.bool_]
"""``[size]``, or ``[outer size, size]`` with as many True in each row."""


def wanted(structure: Structure, plan: Plan) -> int:
    """How many units a plan takes from a structure: from each row, of a ragged one."""
    if structure.name not in plan.kept_units:
        return 0
    return structure.size - len(rows_of(plan.kept_units[structure.name])[0])


def so_far(share: float, count: int, before: int) -> int:
    """How many units are to have gone.

    Args:
        share: how far on the way to the goal the model is.
        count: units that go in the end.
        before: units that have gone.
    """
    return min(count, max(before, round_half_up(share * count)))


def lowest(scores: FloatArray, gone: Gone, count: int) -> Gone:
    """What has gone, and the lowest of the others, until there are `count` in each row.

    Of equal scores the later unit goes, as in every selection.
    """
    size = scores.shape[-1]
    key = np.where(gone, -1.0, scores)[..., ::-1]
    order = size - 1 - np.argsort(key, axis=-1, kind="stable")
    found = np.zeros_like(gone)
    np.put_along_axis(found, order[..., :count], True, axis=-1)
    return found


def plan_of(program: BaseProgram, gone: Mapping[str, Gone]) -> Plan:
    """The plan that keeps what hasn't gone."""
    kept = {name: _kept(units) for name, units in gone.items() if units.any()}
    sizes = {name: program.by_name[name].size for name in kept}
    return Plan(program.fingerprint, kept, sizes).noted(program)


def zeros_of(program: BaseProgram, plan: Plan) -> dict[str, Tensor]:
    """Where weights have elements of units that a plan removes.

    Returns:
        Canonical name of every weight that has any to bool of its shape.
    """
    found = {}
    for name, dims in plan.kept(program).items():
        shape = program.parameters[name]
        if name in program.aliases or name not in program.trainable:
            continue
        if any(len(kept) < size for kept, size in zip(dims, shape, strict=True)):
            stays = torch.zeros(shape, dtype=torch.bool)
            stays[torch.meshgrid(*map(torch.from_numpy, dims), indexing="ij")] = True
            found[name] = ~stays
    return found


def _kept(gone: Gone) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    rows = [tuple(int(i) for i in np.flatnonzero(~row)) for row in np.atleast_2d(gone)]
    return tuple(rows) if gone.ndim > 1 else rows[0]
