"""Whether units are gone when their weights are zero, which is all that a training can do."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import Inputs, run_graph
from graphprune.ir.torch.program import Program
from graphprune.oracle.masked import run_masked
from graphprune.passes.loraprune.units import zeros_of
from graphprune.plan.plan import Plan

TOLERANCE = 1e-4
"""Of float32, in parts of the largest value of an output."""


def zeroed(program: Program, plan: Plan) -> dict[str, Tensor]:
    """Weights that have elements of what a plan removes, with zeros there."""
    return {
        name: program.weights[name].detach().masked_fill(gone, 0.0)
        for name, gone in zeros_of(program, plan).items()
    }


def check_zeroing(program: Program, plan: Plan, inputs: Inputs) -> None:
    """See that a model with zeros in place of units computes what it does without them.

    Args:
        program: the program.
        plan: a trial, of as many units as are to go.
        inputs: (args, kwargs) of a sample.

    Raises:
        PlanError: it doesn't; the role is named.
    """
    if _same(program, plan, inputs):
        return
    roles = dict.fromkeys(program.by_name[name].role for name in plan.kept_units)
    wrong = [
        role
        for role in roles
        if not _same(program, _only(plan, {n for n in plan.kept_units
                                           if program.by_name[n].role == role}), inputs)
    ] or list(roles)  # fmt: skip
    raise PlanError(
        f"LoRAPrune can't remove units of role {wrong[0]!r}",
        where=next(n for n in plan.kept_units if program.by_name[n].role == wrong[0]),
        why="it trains a model whose units have zeros for weights, and this one computes something "
        "else then than without them: a norm counts them, or something fills them in again",
        hint="leave the role out, or choose its units by select",
    )


def _only(plan: Plan, names: Collection[str]) -> Plan:
    return replace(plan, kept_units={n: u for n, u in plan.kept_units.items() if n in names})


def _same(program: Program, plan: Plan, inputs: Inputs) -> bool:
    weights = ChainMap(zeroed(program, plan), cast("dict[str, Tensor]", program.weights))
    found = run_graph(program.exported, weights, inputs, torch.float32, aliases=program.aliases)
    right = run_masked(program, plan.bind(program), inputs, torch.float32)
    return all(map(_close, found, right))


def _close(ours: Any, right: Any) -> bool:
    if not isinstance(right, Tensor):
        return True
    size = max(1.0, float(right.abs().max())) if right.numel() else 1.0
    difference = float((ours - right).abs().max()) if right.numel() else 0.0
    return difference <= TOLERANCE * size
