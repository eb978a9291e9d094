"""Structures: what can only be removed together, and the layers of a stack."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.axes import Atom


@dataclass(frozen=True, slots=True)
class Block:
    """One removable layer of a stack: where it is cut out of the graph and what it owns.

    Attributes:
        index: position in the stack.
        entry: name of the value that takes the place of `exit`.
        exit: name of the value that the rest of the graph reads.
        nodes: names of all values computed inside.
        parameters: names of the parameters that only this layer uses.
    """

    index: int
    entry: str
    exit: str
    nodes: frozenset[str]
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A set of tensor slices that can only be removed together, index by index.

    Attributes:
        name: stable name: the first parameter that carries it, its dimension and the place in
            that dimension's expression, "model.layers.0.mlp.up_proj.weight:0"; for a stack of
            layers the path of the stack, "model.layers".
        role: one of `graphprune.analysis.roles.ROLES`, or "" for a frozen structure.
        size: number of units.
        members: the (parameter, dimension) pairs that carry it; dimension 0 for layers.
        prunable: whether units may be removed.
        reason: why not; None for a prunable structure.
        params: parameters that leave with one unit while everything else stays.
        macs: multiply-accumulates that leave with one unit; see `graphprune.analysis.workload`.
        scope: prefix of its parameters up to the layer number, "model.layers.0".
        atom: its axis; None for layers.
        within: for a ragged axis, the atom whose every index may keep its own units.
        blocks: for layers and for branches of them, one block per unit.
        minimum: units that the model can't do without, such as k of a top-k; where several
            structures make up an axis, enough for every choice of the others.
        parent: for residual branches, the name of the stack whose layers they are parts of.
    """

    name: str
    role: str
    size: int
    members: tuple[tuple[str, int], ...]
    prunable: bool
    reason: str | None
    params: int
    macs: int
    scope: str = ""
    atom: Atom | None = None
    within: Atom | None = None
    blocks: tuple[Block, ...] = ()
    minimum: int = 1
    parent: str = ""
