"""What is checked of gates before the first step: open they do nothing, closed what a cut does."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program
from graphprune.oracle.masked import run_masked
from graphprune.plan.kept import Units, rows_of
from graphprune.plan.plan import Plan
from graphprune.training.checks import check_same
from graphprune.training.core.order import generator
from graphprune.training.core.samples import Micro
from graphprune.training.gates.gates import Gated, Gates
from graphprune.training.model.objective import Objective

_TOLERANCE = 1e-4
"""Largest relative difference in float32 of formulas that add up in other orders."""


def check_open(objective: Objective, gates: Gates, micro: Micro, before: Tensor | None) -> None:
    """Make sure that gates of 1 change nothing; they stay so.

    Args:
        objective: of the gated model.
        gates: its gates.
        micro: samples.
        before: what the model computed of them without gates.

    Raises:
        TrainingError: they do.
    """
    gates.fixed = {name: torch.ones(len(one.free)) for name, one in gates.gated.items()}
    check_same(
        before,
        objective.outputs(micro),
        "with open gates",
        "please report it; choose units by a score (select) meanwhile",
    )


def check_closed(
    program: Program, objective: Objective, gates: Gates, micro: Micro, seed: int
) -> None:
    """Make sure that closed gates do what a cut does, for units drawn at random.

    What is right is computed from the graph without weights that are scaled; see
    `graphprune.oracle.masked`. The gates stay as they were drawn.

    Raises:
        TrainingError: they do something else.
    """
    drawn = {name: _drawn(one, seed) for name, one in gates.gated.items()}
    gates.fixed = {name: _as_gates(one, drawn[name]) for name, one in gates.gated.items()}
    found = objective.outputs(micro)
    if found is None:
        return
    plan = Plan(program.fingerprint, drawn)
    inputs = (micro.args, micro.kwargs)
    masked = run_masked(program, plan.bind(program), inputs, torch.float32)
    right = next(x for x in masked if isinstance(x, Tensor))
    size = float(right.abs().max())
    difference = float((found.cpu().double() - right.cpu().double()).abs().max())
    if not difference <= _TOLERANCE * max(size, 1.0):
        raise TrainingError(
            "closed gates compute something else than the cut model",
            why=f"the largest difference is {difference:.3g}, where values reach {size:.3g}",
            hint="please report it; choose units by a score (select) meanwhile",
        )


def _drawn(one: Gated, seed: int) -> Units:
    """As many units as are to stay, drawn at random."""
    stays = [int(i) for i in range(one.structure.size) if i not in set(one.removable.tolist())]
    rows = []
    for row in range(one.rows):
        noise = generator("proof", seed, one.structure.name, row)
        order = torch.randperm(len(one.removable), generator=noise)[: one.count - len(stays)]
        rows.append(tuple(sorted({*stays, *(int(one.removable[i]) for i in order)})))
    return tuple(rows) if one.structure.within is not None else rows[0]


def _as_gates(one: Gated, units: Units) -> Tensor:
    z = torch.zeros(one.rows, one.structure.size)
    for row, own in enumerate(rows_of(units)):
        z[row, list(own)] = 1.0
    return z.flatten()
