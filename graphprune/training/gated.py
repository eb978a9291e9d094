"""What all ways of learning gates share: the model that has them, and what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program
from graphprune.plan.kept import Units
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.rewrite.apply import apply
from graphprune.rewrite.retrace import retrace
from graphprune.streaming.torch.weights import apply_weights
from graphprune.training.core.options import Training
from graphprune.training.gates.attach import attach
from graphprune.training.gates.gates import Gated, Gates, folded
from graphprune.training.gates.places import Places, places_of
from graphprune.training.model.objective import OwnLoss
from graphprune.training.proof import check_closed, check_open
from graphprune.training.recover import RecoveredProgram, Saving, recover
from graphprune.training.run import Callback, Progress, Run

Solve: TypeAlias = Callable[[Mapping[str, FloatArray]], Mapping[str, int]]
"""From how open the gates of units are, ``[rows, size]`` by structure, to how many units of each
row stay."""

SMALL = 0.1
"""Gates of units that stay below which they are told of."""


class Given(TypedDict, total=False):
    """What is handed on to `graphprune.training.recover`; see there."""

    masks: Mapping[str, Tensor] | None
    teacher: Program | None
    loss: OwnLoss | None
    callbacks: Sequence[Callback]
    state: Saving | str | Path | None
    progress: Callable[[Progress], None] | None


@dataclass(frozen=True)
class Chosen:
    """What gates have chosen.

    Attributes:
        program: the dense program with the weights that were trained, gates multiplied in.
        plan: the units that stay, in exact numbers.
        gates: structure to the gates of its units in the end, 0 for those that go,
            ``[rows * size]``.
        small: structure to the number of units that stay with a gate below 0.1.
        changed: canonical names of the weights that aren't as they were.
        recovered: what training has made.
    """

    program: Program
    plan: Plan
    gates: Mapping[str, Tensor] = field(repr=False)
    small: Mapping[str, int]
    changed: tuple[str, ...]
    recovered: RecoveredProgram = field(repr=False)


@dataclass(frozen=True)
class Form:
    """A model that gates are laid on.

    Attributes:
        program: whose module trains, or whose graph, where something notices units.
        gated: its structures.
        places: where their gates multiply.
        start: the program with the zeros of its masks.
    """

    program: Program
    gated: tuple[Gated, ...]
    places: Places
    start: Program

    @property
    def identity(self) -> list[object]:
        """The structures and how many units of each are to stay, as JSON values."""
        return [
            [one.structure.name, one.rows, one.count, one.removable.tolist(),
             None if one.scores is None else one.scores.tolist()]
            for one in self.gated
        ]  # fmt: skip


def form_of(
    program: Program, gated: Sequence[Gated], masks: Mapping[str, Tensor], training: Training
) -> Form:
    """Find where gates go.

    Raises:
        PlanError: a structure offers no place for gates.
        TrainingError: weights are to be shared among processes, or the model has other structures
            in the dtype that it trains in.
    """
    if training.fsdp:
        raise TrainingError(
            "gates can't be learned with fsdp",
            why="each process needs all gates, and the whole of the weights that they scale",
            hint="leave fsdp out: processes share the samples of each step",
        )
    places = places_of(program, [one.structure for one in gated])
    halves = (torch.float16, torch.bfloat16)
    half = any(program.weights[name].dtype in halves for name in program.trainable)
    if places.noticing and half and program.module is not None:
        program = retrace(apply(traced := program, Plan(program.fingerprint, {})), torch.float32)
        if program.fingerprint != traced.fingerprint:
            raise TrainingError(
                "the model has other structures in float32",
                hint="load it in float32, or leave out the roles whose units norms notice",
            )
        gated = [replace(one, structure=program.by_name[one.structure.name]) for one in gated]
        places = places_of(program, [one.structure for one in gated])
    zeros = {n: program.weights[n].detach().masked_fill(~kept, 0) for n, kept in masks.items()}
    start = apply_weights(program, zeros) if zeros else program
    inner = replace(program, module=None) if places.noticing else program
    return Form(inner, tuple(gated), places, start)


def lay(run: Run, gates: Gates, form: Form, seed: int) -> None:
    """Lay gates on the model of a run, and see that they do what a cut does.

    Raises:
        TrainingError: they don't.
    """
    first = run.feed(run.samples.take([0])).to(run.everyone.device)
    before = run.objective.outputs(first)
    attach(run.trainable, gates, form.places, form.start)
    check_open(run.objective, gates, first, before)
    check_closed(form.start, run.objective, gates, first, seed)
    gates.fixed = None


def train_gated(
    form: Form, data: Any, training: Training, own: Callback, given: Given
) -> RecoveredProgram:
    """Train a model together with its gates.

    Args:
        form: what `own` lays gates on.
        data: see `graphprune.training.recover`.
        training: options; without a loss it is the cross-entropy.
        own: lays gates on the model, and trains them.
        given: see `Given`.

    Raises:
        TrainingError: see `graphprune.training.recover`; or gates don't do on this model what a
            cut does.
    """
    taught = given.get("teacher") is not None
    settled = training.settled(teacher=taught, causal=form.program.is_causal)
    # The others see the model before it has gates.
    handed: Given = {**given, "callbacks": (*given.get("callbacks", ()), own)}
    return recover(form.program, data, settled, **handed)


def settle(
    program: Program,
    form: Form,
    gates: Mapping[str, Tensor],
    found: RecoveredProgram,
    *,
    fold: bool = True,
) -> Chosen:
    """Multiply gates into the weights, and keep the units whose gates are open.

    Args:
        program: as it was given.
        form: what was trained of it.
        gates: structure to the gates of its units, ``[rows * size]``.
        found: what training has made.
        fold: whether gates are multiplied in; otherwise units that stay are as they were trained.
    """
    plan = Plan(
        program.fingerprint,
        {one.structure.name: _units(one, gates[one.structure.name]) for one in form.gated},
        {one.structure.name: one.structure.size for one in form.gated},
    )
    # What goes is left as it is: it is cut, and zeros would look like those of a mask.
    open_ = {name: torch.where(z > 0, z, 1.0) for name, z in gates.items()}
    new, folding = dict(found.weights), form.places.by_parameter if fold else {}
    for name, on in folding.items():
        new[name] = folded(new.get(name, form.program.weights[name].detach()), on, open_)
    new = {name: weight.to(program.weights[name].dtype) for name, weight in new.items()}
    made, changed = apply_weights(program, new), tuple(new)
    return Chosen(made, plan.noted(program), gates, small_of(gates), changed, found)


def small_of(gates: Mapping[str, Tensor]) -> dict[str, int]:
    """Structure to the number of its units that stay with gates below `SMALL`, where any do."""
    counts = {name: int(((z > 0) & (z < SMALL)).sum()) for name, z in gates.items()}
    return {name: count for name, count in counts.items() if count}


def _units(one: Gated, gates: Tensor) -> Units:
    """The units that stay, as a plan has them."""
    rows = tuple(
        tuple(int(i) for i in np.flatnonzero(row))
        for row in gates.view(one.rows, one.structure.size).numpy()
    )
    return rows if one.structure.within is not None else rows[0]
