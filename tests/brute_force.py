"""What the units of a structure own, found by loops; an oracle for scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from graphprune.analysis.structure import Structure
from graphprune.axes import mask
from graphprune.ir.torch.program import Program


def owned(program: Program, structure: Structure, parameter: str, dim: int) -> list[list[int]]:
    """Positions of a dimension that each unit owns (each pair, where it is ragged)."""
    e = program.axis(parameter, dim)
    atom, outer = structure.atom, structure.within
    assert atom is not None

    def lost(a, unit: int) -> set[int]:
        return set(np.flatnonzero(~mask(e, {a: np.arange(a.size) != unit})).tolist())

    if outer is None:
        return [sorted(lost(atom, u)) for u in range(atom.size)]
    return [
        sorted(lost(outer, o) & lost(atom, u)) for o in range(outer.size) for u in range(atom.size)
    ]


def trainable_members(program: Program, structure: Structure) -> list[tuple[str, int]]:
    """Parameters and dimensions that carry a structure, the one that the graph reads last last."""
    nodes = list(program.exported.graph.nodes)
    last: dict[str, int] = {}
    for spec in program.exported.graph_signature.input_specs:
        if spec.target is not None:
            (node,) = (n for n in nodes if n.name == spec.arg.name)
            name = program.aliases.get(spec.target, spec.target)
            places = [i for i, n in enumerate(nodes) if node in n.all_input_nodes]
            last[name] = max([*places, last.get(name, -1)])
    members = [(p, d) for p, d in structure.members if p in program.trainable]
    return sorted(members, key=lambda member: last[member[0]])


def by_loops(
    program: Program, structure: Structure, salience: Callable[[str], torch.Tensor]
) -> np.ndarray:
    """Sum of a salience over what each unit owns: ``[members, units]`` in float64."""
    rows = []
    for parameter, dim in trainable_members(program, structure):
        s = salience(parameter).detach().double().movedim(dim, 0)
        units = owned(program, structure, parameter, dim)
        rows.append([sum(float(s[i].sum()) for i in unit) for unit in units])
    return np.array(rows)
