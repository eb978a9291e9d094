"""From what a caller gives to a run, and from a run that has ended to weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.training.checks import check_same, keeps_head, predicts_next, variance
from graphprune.training.core.options import Training
from graphprune.training.core.order import Order
from graphprune.training.core.processes import Processes, full, shard
from graphprune.training.core.samples import Feed, Micro, Samples
from graphprune.training.model.held import HeldMasks, check_masks
from graphprune.training.model.objective import Objective, OwnLoss, Setting
from graphprune.training.model.student import Student, recompute_blocks
from graphprune.training.model.trainable import make_trainable
from graphprune.training.run import Callback, Run


@dataclass(frozen=True)
class Job:
    """What is to be trained on what; see `graphprune.training.recover.recover`."""

    student: Student
    teacher: Student | None
    samples: Samples
    feed: Feed
    training: Training
    masks: Mapping[str, Tensor]
    layouts: Mapping[str, Any]
    everyone: Processes
    loss: OwnLoss | None
    vocabulary: Tensor | None
    layers: Mapping[str, str] | None
    part: tuple[float, float]
    callbacks: Sequence[Callback] = ()

    def first(self) -> Micro:
        """The first sample."""
        return self.feed(self.samples.take([0])).to(self.everyone.device)


def prepare(job: Job) -> Run:
    """Choose what trains, and check that it can.

    Raises:
        TrainingError: see `graphprune.training.recover.recover`.
    """
    training, everyone = job.training, job.everyone
    if training.needs_teacher and job.loss is None and job.teacher is None:
        raise TrainingError(
            f"loss {training.loss} needs a teacher", hint="give the dense model as teacher="
        )
    first = job.first()
    student, teacher = _placed(job, job.student, first), None
    if job.teacher is not None:
        teacher = _placed(job, job.teacher, first)
    check_masks(student.module, job.masks)
    held = HeldMasks(student.module, job.masks)
    held.fill()
    plain = Objective(student, Setting(training, own=job.loss))
    before = plain.outputs(first) if training.train == "lora" else None
    trainable = make_trainable(student, training, held, job.layouts)
    if before is not None:
        check_same(
            before,
            plain.outputs(first),
            "with adapters that add nothing",
            "train: full changes the weights themselves",
        )
    setting = Setting(training, teacher, job.loss, job.vocabulary)
    if job.loss is None and training.loss in ("ce", "kd", "kd+ce"):
        setting.causal = predicts_next(student, first)
    elif job.loss is None and training.loss == "values":
        assert teacher is not None
        setting.variance = variance(teacher, job.samples, job.feed, everyone.device)
    elif job.loss is None and training.loss == "hidden":
        setting.layers = _pairs(job, student, teacher)
    if training.checkpointing:
        recompute_blocks(student)
    objective = Objective(student, setting)
    if training.fsdp:
        shard(objective, [f"model.{path}" for path in student.blocks], everyone)
    order = _order(job, first)
    run = Run(
        objective, trainable, training, job.samples, job.feed, order, everyone,
        callbacks=job.callbacks,
    )  # fmt: skip
    for one in job.callbacks:
        one.attach(run)
    if not trainable.names and not run.own():
        raise TrainingError(
            "there is nothing to train",
            why="train: frozen keeps all weights, and no callback brings parameters of its own",
            hint="train: full, norms or lora",
        )
    return run


def finish(job: Job, run: Run) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The new weights in the dtypes of the old ones, and the zeros of those with masks.

    Raises:
        TrainingError: the weights alone compute something else than was trained.
    """
    if run.trainable.adapted:
        first = job.first()
        before = run.objective.outputs(first)
        run.trainable.merge()
        check_same(
            before,
            run.objective.outputs(first),
            "with its adapters merged",
            "please report it, and use train: full meanwhile",
        )
    trained = run.trainable.weights()
    weights, zeros = {}, {}
    for name in job.student.names:
        if name not in trained and name not in job.masks:
            continue
        weight = trained[name] if name in trained else full(run.trainable.weight(name))
        weight = weight.to(device="cpu", dtype=job.student.dtypes[name])
        if name in job.masks:
            weight = weight.masked_fill(~job.masks[name].cpu(), 0.0)
            zeros[name] = weight.numel() - int(weight.count_nonzero())
        weights[name] = weight.contiguous()
    return weights, zeros


def _placed(job: Job, model: Student, first: Micro) -> Student:
    """A model on the device, whose head is known to be one."""
    placed = replace(model, module=model.module.to(job.everyone.device))
    known = job.loss is None and keeps_head(placed, first)
    return placed if known else replace(placed, head=None)


def _order(job: Job, first: Micro) -> Order:
    """Which samples each step sees."""
    training, count = job.training, len(job.samples)
    if count < training.batch:
        raise TrainingError(
            "there are fewer samples than a step takes",
            why=f"{count}, and the batch is {training.batch}",
            hint="give more text, or take a smaller batch",
        )
    total = math.ceil(count * (training.epochs or 1))
    if training.steps is not None:
        total = training.steps * training.batch
    elif training.tokens is not None:
        if first.tokens is None:
            raise TrainingError(
                "the data have no tokens to count", hint="say how many steps, not how many tokens"
            )
        total = -(-training.tokens * first.count // first.tokens.numel())
    return Order(count, total, training.batch, training.seed).part(*job.part)


def _pairs(job: Job, student: Student, teacher: Student | None) -> Mapping[str, str]:
    """Which layer of the student is compared with which of the teacher's."""
    assert teacher is not None
    if job.layers is not None:
        return job.layers
    ours, theirs = student.blocks, teacher.blocks
    if not ours or len(ours) != len(theirs):
        raise TrainingError(
            "loss hidden doesn't know which layers to compare",
            why=f"the model has {len(ours)} layers, its teacher {len(theirs)}",
            hint="give layers=, the path of each layer to that of the teacher's",
        )
    return dict(zip(ours, theirs, strict=True))
