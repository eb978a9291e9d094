"""Training of what pruning has left, with its zeros held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.analysis.program import BaseProgram
from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program
from graphprune.streaming.programs import find_sites
from graphprune.streaming.torch.weights import apply_weights
from graphprune.training.core.options import Training
from graphprune.training.core.processes import processes
from graphprune.training.core.samples import ModuleFeed, OwnFeed, ProgramFeed, samples_of
from graphprune.training.core.watch import stopping
from graphprune.training.identity import identity
from graphprune.training.loop import train
from graphprune.training.model.adapters import Flat
from graphprune.training.model.objective import OwnLoss
from graphprune.training.model.student import (
    check_trainable,
    student_of,
    student_of_module,
)
from graphprune.training.preparing import Job, finish, prepare
from graphprune.training.run import Callback, Progress
from graphprune.training.state import Saved


@dataclass(frozen=True)
class Saving:
    """Where a run saves its progress.

    Attributes:
        directory: made if it doesn't exist.
        resume: go on from what it holds, or begin if it holds nothing.
        every: steps between two saves; None saves where that takes at most a twentieth of the time.
    """

    directory: Path
    resume: bool = False
    every: int | None = None


@dataclass(frozen=True)
class Recovered:
    """What training has made.

    Attributes:
        weights: canonical parameter name to the new weight, in the dtype of the old one: of all
            that trained or has a mask.
        steps: optimiser steps.
        tokens: that were trained on; samples, of what is no text.
        losses: mean loss of each step.
        zeros: zeros of each weight with a mask.
        notes: what people should know.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    steps: int
    tokens: int
    losses: tuple[float, ...]
    zeros: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecoveredProgram(Recovered):
    """See `Recovered`.

    Attributes:
        program: the program with the new weights.
    """

    program: Program = field(kw_only=True)


def recover(
    program: BaseProgram,
    data: Any,
    training: Training | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: Program | None = None,
    loss: OwnLoss | None = None,
    vocabulary: Tensor | None = None,
    layers: Mapping[str, str] | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    callbacks: Sequence[Callback] = (),
    state: Saving | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> RecoveredProgram:
    """Train the weights of a program; structures, graph and source stay.

    Under torchrun every process calls this with the same arguments, takes its share of each batch,
    and gets the same result.

    Args:
        program: a dense, slim or masked model; not changed.
        data: samples as `graphprune.calibration.batches` takes them, which a mapping may give
            "labels" beside (of the logits' shape without classes; -100 doesn't count). Of a causal
            language model the label of a token is the next one, in given labels too.
        training: options.
        masks: canonical parameter name to bool of its shape, True where a weight stays. All others
            are zeros from the start, and stay so to the bit.
        teacher: the model that the losses "kd", "kd+ce", "hidden" and "values" compare with.
        loss: a loss in place of the named one: a function of (model, samples) that gives their mean
            loss, or the sum over what counts and the count.
        vocabulary: int ``[classes]``, which of the teacher's classes the student has kept.
        layers: for "hidden", path of each layer to the path of the teacher's it is compared with;
            None for the layers of all stacks, in order.
        part: which part of the steps this call does, from where to where: where a model is pruned
            in rounds, samples and learning rate go on from one to the next.
        callbacks: what takes part beside the weights: gates, shares of domains.
        state: where progress is saved, after each of some steps and when SIGTERM comes.
        progress: told after each step.

    Raises:
        TrainingError: the program can't be trained, the data don't fit, or the loss is no number or
            diverges.
        LoadError: the state belongs to another run, or is damaged.
    """
    program = check_trainable(program)
    training = training or Training()
    training = training.settled(teacher=teacher is not None, causal=program.is_causal)
    everyone = processes()
    layouts: dict[str, Any] = {}
    if training.train == "lora":
        groups = find_sites(program, training.include, training.exclude).groups
        layouts = {p: g.layout(p) for g in groups for p in g.parameters}
    feed = ProgramFeed(program) if loss is None else OwnFeed()
    right = None
    if teacher is not None:
        right = student_of(check_trainable(teacher), shared=everyone.device.type == "cpu")
    job = Job(
        student_of(program), right, samples_of(data), feed, training,
        masks or {}, layouts, everyone, loss, vocabulary, layers, part, callbacks,
    )  # fmt: skip
    found = _run(job, program, teacher, state, progress)
    return RecoveredProgram(**vars(found), program=apply_weights(program, found.weights))


def recover_module(
    module: nn.Module,
    data: Any,
    training: Training | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
    loss: OwnLoss | None = None,
    vocabulary: Tensor | None = None,
    layers: Mapping[str, str] | None = None,
    state: Saving | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Recovered:
    """Train the weights of a module in place: of any module, which no graph has to be known of.

    See `recover`. Samples are given as the module takes them: mappings by keyword, tuples and
    tensors by position. Adapters go to all weights of linear layers and convolutions. While it
    trains, the module computes as in evaluation mode; its own mode isn't changed.
    """
    training = (training or Training()).settled(teacher=teacher is not None, causal=True)
    student = student_of_module(module)
    layouts = {name: Flat() for name in _matrices(module) if name in student.names}
    feed = ModuleFeed() if loss is None else OwnFeed()
    right = None if teacher is None else student_of_module(teacher)
    job = Job(
        student, right, samples_of(data), feed, training, masks or {}, layouts,
        processes(), loss, vocabulary, layers, (0.0, 1.0),
    )  # fmt: skip
    found = _run(job, module, teacher, state, progress)
    with torch.no_grad():
        for name, weight in found.weights.items():
            module.get_parameter(name).copy_(weight)
    return found


def _run(
    job: Job,
    base: Program | nn.Module,
    teacher: Program | nn.Module | None,
    state: Saving | str | Path | None,
    progress: Callable[[Progress], None] | None,
) -> Recovered:
    """Train, and take the weights."""
    run = prepare(job)
    resume = False
    if state is not None:
        saving = state if isinstance(state, Saving) else Saving(Path(state))
        names = identity(
            base, teacher, job.masks, job.samples, job.training, job.loss, job.part,
            job.everyone.world, [one.identity() for one in job.callbacks],
        )  # fmt: skip
        run.saved = Saved(
            Path(saving.directory), names, job.everyone, job.training.fsdp, saving.every
        )
        resume = saving.resume
    run.progress = progress
    with stopping() if run.saved is not None else nullcontext() as stop:
        train(run, stop, resume=resume)
    if stop is not None and stop.number is not None:
        raise TrainingError(
            "training was stopped by a signal",
            where=f"step {len(run.losses)} of {run.order.steps}",
            hint=f"resume it from {run.saved.directory}" if run.saved else None,
        )
    weights, zeros = finish(job, run)
    passes = run.order.seen / run.order.count
    notes = (f"the data went through {passes:.2g} times",) if passes > 1 else ()
    return Recovered(weights, len(run.losses), run.tokens, tuple(run.losses), zeros, notes)


def _matrices(module: nn.Module) -> set[str]:
    """Names of the weights of linear layers and convolutions."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {
        f"{path}.weight".lstrip(".") for path, m in module.named_modules() if isinstance(m, kinds)
    }
