"""LoRAPrune over a program, from the first check to the plan and the merged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.errors import PlanError, TrainingError
from graphprune.ir.torch.program import Program
from graphprune.passes.loraprune.events import Event, UnitPruner
from graphprune.passes.loraprune.goal import Trial, solved
from graphprune.passes.loraprune.options import Pruning
from graphprune.passes.loraprune.zeroing import check_zeroing, zeroed
from graphprune.plan.plan import Plan
from graphprune.streaming import apply_weights
from graphprune.streaming.programs import find_sites
from graphprune.training.core.options import Training
from graphprune.training.core.samples import ProgramFeed, samples_of
from graphprune.training.model.objective import OwnLoss
from graphprune.training.model.student import check_trainable
from graphprune.training.recover import Recovered, Saving, recover
from graphprune.training.run import Progress


@dataclass(frozen=True)
class LoRAPruned:
    """What LoRAPrune has made.

    Attributes:
        program: at full size, with what adapters have learnt in its weights, and zeros in place of
            the units that have gone.
        plan: which units stay.
        trained: see `graphprune.training.Recovered`.
        events: when units went, and how many.
        notes: what people should know.
    """

    program: Program
    plan: Plan
    trained: Recovered
    events: tuple[Event, ...]
    notes: tuple[str, ...] = ()


def loraprune(
    program: BaseProgram,
    data: Any,
    pruning: Pruning,
    training: Training | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: Program | None = None,
    loss: OwnLoss | None = None,
    state: Saving | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> LoRAPruned:
    """Train adapters, and remove the units that their gradients show to matter least.

    Args:
        program: a dense or masked model; not changed.
        data: see `graphprune.training.recover`.
        pruning: what to remove, and when.
        training: options; it trains adapters, and its loss is the cross-entropy by default.
        masks: single weights that are zero; see `graphprune.training.recover`.
        teacher: what the losses "kd+ce" and, of a model that isn't like it, "kd" compare with.
        loss: see `graphprune.training.recover`.
        state: where progress is saved.
        progress: told after each step.

    Raises:
        PlanError: the goal can't be reached, or units of a role don't go by zeros.
        TrainingError: see `graphprune.training.recover`; or there is no step.
        LoadError: the state belongs to another run, or is damaged.
    """
    traced = check_trainable(program)
    training = replace(training or Training(train="lora", loss="ce"), train="lora")
    training = training if training.loss is not None else replace(training, loss="ce")
    _check_training(training, alike=teacher is traced and not masks and loss is None)
    plan, pruner = check(traced, pruning, training)
    samples = samples_of(data)
    first = ProgramFeed(traced)(samples.take([0]))
    check_zeroing(traced, plan, (first.args, first.kwargs))
    found = recover(
        traced, samples, training,
        masks=masks, teacher=teacher, loss=loss, state=state, progress=progress,
        callbacks=(pruner,),
    )  # fmt: skip
    if not pruner.finished:
        raise TrainingError(
            "there was no step to remove anything at",
            why=f"the training has {found.steps} steps",
            hint="give it more steps, tokens or epochs",
        )
    whole = apply_weights(found.program, zeroed(found.program, pruner.plan))
    notes = (*found.notes, *pruner.notes)
    return LoRAPruned(whole, pruner.plan, found, tuple(pruner.events), notes)


def check(program: Program, pruning: Pruning, training: Training) -> tuple[Plan, UnitPruner]:
    """See that a goal can be reached, without data.

    Returns:
        A plan of the sizes that the model will have, of units at random; and what prunes it.

    Raises:
        PlanError: it can't, or it is about layers.
    """
    sites = find_sites(program, training.include, training.exclude)
    notes: list[str] = []
    trial = Trial(frozenset(sites.parameters))
    plan = solved(program, pruning, trial, notes)
    layers = [s for s in trial.asked.values() if s.atom is None]
    if layers:
        raise PlanError(
            "LoRAPrune removes rows and columns of weights, not layers",
            where=layers[0].name,
            hint="remove layers in a step select before it",
        )
    if not plan.kept_units:
        raise PlanError(
            "LoRAPrune has nothing to remove",
            why="; ".join(notes) or "the goal leaves everything",
            hint="ask for less of the model",
        )
    names = [s.name for s in program.structures if s.name in trial.asked]
    pruner = UnitPruner(program, pruning, tuple(program.by_name[n] for n in names))
    return plan, pruner


def _check_training(training: Training, *, alike: bool) -> None:
    if training.fsdp:
        raise TrainingError(
            "LoRAPrune needs whole weights on every process",
            why="fsdp shares them out",
            hint="leave fsdp out; processes share the samples all the same",
        )
    if alike and training.loss in ("kd", "values", "hidden"):
        raise TrainingError(
            f"loss {training.loss} tells nothing of which units matter",
            why="the model and its teacher are the same at first, where nothing changes the loss",
            hint="take loss: ce, or kd+ce",
        )
