"""What a score is, and what scores that start from a per-element salience share.

A score tells how much a structure's units matter. It is a frozen dataclass, its fields are its
options, and it is found by name in the registry of `graphprune.passes.scores`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.passes.shared.reduce import Salience, marginals
from graphprune.plan.units import FloatArray, pair_sums, unit_sums

Loss = Callable[[Callable[..., Any], Any], torch.Tensor]

Sums: TypeAlias = Mapping[int, FloatArray]
"""Dimension to a float64 vector: a sum over all other dimensions, index by index."""


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
    """Importance of units, before aggregation over members and normalisation.

    A score that needs calibration data says so by an attribute ``needs_data`` that is true; none is
    read for the others. One that can't judge every structure may have a method ``unjudged(program,
    structures)``, which returns the names of those that it can't judge and why: they stay whole.
    """

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`.

        Returns:
            Structure name to ``[members, size]``, one row per parameter dimension that
            contributes, what the graph reads last at the end; ``[members, outer size, size]`` for
            a structure that is ragged within another; ``[1, size]`` for layers. Higher means more
            important.
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
    dims = wanted_dims(program, structures)

    def sums(parameter: str) -> Sums | None:
        found = tensors(parameter)
        if any(t.is_meta for t in found):
            return None
        return checked_marginals(parameter, found, salience, dims[parameter])

    return distributed(program, structures, sums)


def wanted_dims(program: BaseProgram, structures: Sequence[Structure]) -> dict[str, list[int]]:
    """The dimensions of each parameter over whose indices a salience has to be summed.

    Returns:
        Canonical name of every trainable member to dimensions, at least one; 0 for layers.
    """
    wanted: dict[str, dict[int, None]] = defaultdict(dict)
    for structure in structures:
        for parameter, dim in _contributing(program, structure):
            wanted[parameter][dim] = None
        for block in structure.blocks:
            for parameter in block.parameters:
                if parameter in program.trainable:
                    wanted[parameter][0] = None
    return {parameter: list(dims) for parameter, dims in wanted.items()}


def distributed(
    program: BaseProgram,
    structures: Sequence[Structure],
    sums: Callable[[str], Sums | None],
) -> dict[str, FloatArray]:
    """Hand the sums over each dimension's indices to the units that own them.

    Args:
        program: the program.
        structures: to be scored.
        sums: gives, for each parameter of `wanted_dims`, each wanted dimension's sums over all
            other dimensions; None leaves the parameter out. Called once per parameter.

    Returns:
        As `Score.score`; rows in the order in which the graph last reads the members.
    """
    users: dict[str, list[tuple[Structure, int]]] = defaultdict(list)
    owners: dict[str, list[tuple[Structure, int]]] = defaultdict(list)
    for structure in structures:
        if structure.atom is not None:
            for parameter, dim in _contributing(program, structure):
                users[parameter].append((structure, dim))
        for block in structure.blocks:
            for parameter in block.parameters:
                if parameter in program.trainable:
                    owners[parameter].append((structure, block.index))
    rows: dict[tuple[str, str, int], FloatArray] = {}
    layers = {s.name: np.zeros(s.size) for s in structures if s.blocks}
    for parameter in dict.fromkeys([*users, *owners]):
        found = sums(parameter)
        if found is None:
            continue
        for structure, dim in users.get(parameter, ()):
            row = _distribute(program, structure, parameter, dim, found)
            rows[structure.name, parameter, dim] = row
        for structure, index in owners.get(parameter, ()):
            layers[structure.name][index] += found[0].sum()
    places = _last_reads(program)
    return {
        s.name: layers[s.name][None] if s.blocks else _stacked(program, s, rows, places)
        for s in structures
    }


def _stacked(
    program: BaseProgram,
    structure: Structure,
    rows: Mapping[tuple[str, str, int], FloatArray],
    places: Mapping[str, int],
) -> FloatArray:
    """The rows of a structure, the member that the graph reads last at the end."""
    members = sorted(_contributing(program, structure), key=lambda m: places.get(m[0], -1))
    keys = [(structure.name, *member) for member in members]
    found = [rows[key] for key in keys if key in rows]
    outer = (structure.within.size,) if structure.within else ()
    return np.stack(found) if found else np.zeros((0, *outer, structure.size))


def _last_reads(program: BaseProgram) -> dict[str, int]:
    """Canonical name of each parameter to the place of the last operator that reads it."""
    flow = program.flow()
    last: dict[str, int] = {}
    for name, values in flow.readers.items():
        own = program.aliases.get(name, name)
        found = max((flow.places.get(v, len(flow.places)) for v in values), default=-1)
        last[own] = max(found, last.get(own, -1))
    return last


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


def checked_marginals(
    parameter: str, tensors: tuple[torch.Tensor, ...], salience: Salience, dims: Collection[int]
) -> Sums:
    """Sums of a parameter's salience; see `graphprune.passes.shared.reduce.marginals`.

    Raises:
        PlanError: they are not finite.
    """
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
