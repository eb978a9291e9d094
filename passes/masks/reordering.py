"""Orders of channels in which n:m masks lose less, taken on by the model itself.

What reads a value in groups of m would often rather have other channels side by side. The channels
between the layers of a feed-forward block are units of a structure: every tensor that carries them
takes the new order, and the model computes what it did. The residual stream, which every layer
would have in an order of its own, and the values of a head, which come head by head, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.passes.masks.allocations import Watching
from graphprune.passes.masks.ria import RIA, best_order, ria_scores
from graphprune.plan.plan import Plan
from graphprune.plan.units import NONE
from graphprune.solvers import NM, Norms, Pattern, Statistic
from graphprune.streaming import Group, Sites, Treatment, apply_weights
from graphprune.streaming.consumers import Consumer, consumers, owning_units

Run = Callable[[Treatment], object]
Choose = Callable[[str], Pattern]


@dataclass(frozen=True, eq=False)
class Reordered:
    """A program whose channels have other places.

    Attributes:
        program: equal to what it was made from but for rounding, which has been checked.
        changed: the parameters and buffers in a new order, by their canonical names.
        notes: for each weight that reads channels in a better order: what it gains.
    """

    program: BaseProgram
    changed: tuple[str, ...]
    notes: Mapping[str, str]


def reordered(
    program: BaseProgram, sites: Sites, solver: RIA, pattern: Choose, run: Run
) -> Reordered:
    """Give channels that one layer reads the order in which its mask keeps the most.

    Args:
        program: it isn't changed.
        sites: the weights that get masks.
        solver: says what a weight is worth.
        pattern: of a parameter; those that aren't n:m stay as they are.
        run: streams the samples through the program.

    Raises:
        PlanError, CalibrationError: see `graphprune.streaming.stream`.
        VerifyError: the model computes something else in the new order.
    """
    movable = _movable(program, sites, pattern)
    if not movable:
        return Reordered(program, (), {})
    orders: dict[str, IntArray] = {}
    notes: dict[str, str] = {}

    def look(group: Group, seen: Sequence[Statistic | None], weights: Mapping[str, Tensor]) -> None:
        for name, users in movable.items():
            here = [c for c in users if c.group == group.index]
            if not here or seen[0] is None or seen[0].silent:
                continue
            matrices = [group.layout(c.parameter).matrices(weights[c.parameter])[0] for c in here]
            scores = torch.cat([ria_scores(m, seen[0], solver.power) for m in matrices])
            chosen = pattern(here[0].parameter)
            assert isinstance(chosen, NM)
            order, gain = best_order(scores, torch.cat(matrices), chosen)
            if order is not None:
                orders[name] = order.cpu().numpy()
                note = f"its inputs are reordered: the mask keeps {gain:.1%} more score"
                notes.update({c.parameter: note for c in here})

    run(Watching(Norms, look))
    new = _moved(program, orders)
    moved = apply_weights(program, new)
    if new:
        _check(program, moved)
    return Reordered(moved, tuple(new), notes)


def _movable(
    program: BaseProgram, sites: Sites, pattern: Choose
) -> dict[str, tuple[Consumer, ...]]:
    """Structures that one layer alone reads, unit by unit, and what reads them."""
    stored = program.weights.keys() - getattr(program, "encodings", {})
    found = {}
    for s in program.structures:
        if not s.prunable or s.atom is None or s.within is not None:
            continue
        users = consumers(program, [s], sites)[s.name]
        alone = len({c.group for c in users}) == 1
        patterns = {pattern(c.parameter) for c in users}
        if (
            alone
            and len(patterns) == 1
            and isinstance(patterns.pop(), NM)
            and all(np.array_equal(c.units, np.arange(s.size)[None]) for c in users)
            and all(
                program.aliases.get(p, p) in stored and _even(program, s, p, d) is not None
                for p, d in s.members
            )
        ):
            found[s.name] = users
    return found


def _even(program: BaseProgram, structure: Structure, parameter: str, dim: int) -> IntArray | None:
    """[size, times]: the places of each unit in a dimension; None if they aren't equally many."""
    units = owning_units(program.axis(parameter, dim), structure)
    if units is None:
        return None
    owned = np.flatnonzero(units != NONE)
    if len(np.unique(np.bincount(units[owned], minlength=structure.size))) != 1:
        return None
    return owned[np.argsort(units[owned], kind="stable")].reshape(structure.size, -1)


def _moved(program: BaseProgram, orders: Mapping[str, IntArray]) -> dict[str, Tensor]:
    """All that carries reordered channels, in the new order."""
    new: dict[str, Tensor] = {}
    for structure in program.structures:
        if structure.name not in orders:
            continue
        members = ((program.aliases.get(p, p), d) for p, d in structure.members)
        for parameter, dim in dict.fromkeys(members):
            places = _even(program, structure, parameter, dim)
            assert places is not None
            index = np.arange(program.parameters[parameter][dim])
            index[places] = places[orders[structure.name]]
            weight = new.get(parameter, program.weights[parameter].detach())
            new[parameter] = weight.index_select(dim, torch.from_numpy(index).to(weight.device))
    return new


def _check(program: BaseProgram, moved: BaseProgram) -> None:
    from graphprune.oracle.verify import verify
    from graphprune.rewrite.apply import apply

    nothing = Plan(program.fingerprint, {})
    verify(program, nothing, apply(moved, nothing)).raise_if_failed()
