"""What a score is, and what scores that start from a per-element salience share.

A score tells how much a structure's units matter. It is a frozen dataclass, its fields are its
options, and it is found by name in the registry of `graphprune.passes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from graphprune.errors import PlanError
from graphprune.passes.reduce import Salience, marginals
from graphprune.passes.units import FloatArray, pair_sums, unit_sums
from graphprune.program import BaseProgram, Structure

Loss = Callable[[Callable[..., Any], Any], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """What a score may use besides the program.

    Attributes:
        calibration: a tensor of token windows ``[windows, length]``, or a sequence of batches of
            any kind that `loss` understands.
        loss: ``loss(model, batch)`` gives a scalar; None is next-token cross-entropy.
        seed: of everything random.
    """

    calibration: Any = None
    loss: Loss | None = None
    seed: int = 0


class Score(Protocol):
    """Importance of units, before aggregation over members and normalisation."""

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`.

        Returns:
            Structure name to ``[members, size]``, one row per parameter dimension that
            contributes; ``[members, outer size, size]`` for a structure that is ragged within
            another; ``[1, size]`` for layers. Higher means more important.
        """


def member_sums(
    program: BaseProgram,
    structures: Sequence[Structure],
    tensors: Callable[[str], tuple[torch.Tensor, ...]],
    salience: Salience,
) -> dict[str, FloatArray]:
    """Sum a per-element salience over what each unit owns in each member.

    For member ``(p, d)`` whose dimension d has the axis expression e::

        score[unit] = sum of salience(p)[..., i, ...] over all positions i of e that unit owns
                      and over all other dimensions

    For layers, the sum over all parameters of the unit's blocks. Parameters count, buffers don't;
    tied parameters count once, and weights on the meta device, which have no values, as zeros.
    Every parameter is read once, whatever the number of structures and dimensions.

    Args:
        program: the program.
        structures: to be scored.
        tensors: what `salience` takes for a parameter.
        salience: element by element, ``>= 0``.

    Returns:
        As `Score.score`.

    Raises:
        PlanError: a salience is not finite.
    """
    wanted: dict[str, dict[int, list[Structure]]] = defaultdict(lambda: defaultdict(list))
    owners: dict[str, list[tuple[Structure, int]]] = defaultdict(list)
    for structure in structures:
        for parameter, dim in _contributing(program, structure):
            if structure.atom is not None:
                wanted[parameter][dim].append(structure)
        for block in structure.blocks:
            for parameter in block.parameters:
                if parameter in program.trainable:
                    owners[parameter].append((structure, block.index))
    rows: dict[tuple[str, str, int], FloatArray] = {}
    layers = {s.name: np.zeros(s.size) for s in structures if s.blocks}
    for parameter in dict.fromkeys([*wanted, *owners]):
        by_dim = wanted.get(parameter, {})
        sums = _checked_sums(parameter, tensors(parameter), salience, list(by_dim) or [0])
        if sums is None:
            continue
        for dim, users in by_dim.items():
            for structure in users:
                row = _distribute(program, structure, parameter, dim, sums)
                rows[structure.name, parameter, dim] = row
        for structure, index in owners.get(parameter, ()):
            layers[structure.name][index] += next(iter(sums.values())).sum()
    return {
        s.name: layers[s.name][None] if s.blocks else _stacked(program, s, rows) for s in structures
    }


def _stacked(
    program: BaseProgram, structure: Structure, rows: Mapping[tuple[str, str, int], FloatArray]
) -> FloatArray:
    """The rows of a structure in the order of its members."""
    keys = [(structure.name, *member) for member in _contributing(program, structure)]
    found = [rows[key] for key in keys if key in rows]
    outer = (structure.within.size,) if structure.within else ()
    return np.stack(found) if found else np.zeros((0, *outer, structure.size))


def _contributing(program: BaseProgram, structure: Structure) -> list[tuple[str, int]]:
    members = ((program.aliases.get(p, p), d) for p, d in structure.members)
    return [(p, d) for p, d in dict.fromkeys(members) if p in program.trainable]


def _distribute(
    program: BaseProgram,
    structure: Structure,
    parameter: str,
    dim: int,
    sums: Mapping[int, FloatArray],
) -> FloatArray:
    """One member's contribution to each unit of a structure."""
    e = program.axis(parameter, dim)
    assert structure.atom is not None
    if structure.within is None:
        return unit_sums(sums[dim], e, structure.atom)
    return pair_sums(sums[dim], e, structure.within, structure.atom)


def _checked_sums(
    parameter: str, tensors: tuple[torch.Tensor, ...], salience: Salience, dims: list[int]
) -> dict[int, FloatArray] | None:
    if any(t.is_meta for t in tensors):
        return None
    sums = marginals(tensors, salience, dims)
    if not np.isfinite(next(iter(sums.values())).sum()):
        broken = any(not bool(t.isfinite().all()) for t in tensors)
        raise PlanError(
            "a score is not a finite number",
            where=f"parameter {parameter}",
            why="it holds NaN or infinite values" if broken else "the sum over it overflows",
            hint="repair the checkpoint, exclude the parameter, or take another score",
        )
    return sums
