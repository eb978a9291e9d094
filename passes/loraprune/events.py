"""What LoRAPrune does in the course of a training: it scores units, and removes some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from graphprune.analysis.structure import Structure
from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program
from graphprune.passes.loraprune.criterion import estimated, importance
from graphprune.passes.loraprune.goal import Averaged, solved
from graphprune.passes.loraprune.members import Member, members_of, shape_of
from graphprune.passes.loraprune.options import Pruning
from graphprune.passes.loraprune.units import Gone, lowest, plan_of, so_far, wanted, zeros_of
from graphprune.passes.shared.reduce import marginals
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.training.run import Callback, Run


@dataclass(frozen=True)
class Event:
    """Units that went.

    Attributes:
        step: after which.
        share: how far on the way to the goal the model is.
        removed: units that have gone by then, of all structures.
    """

    step: int
    share: float
    removed: int


@dataclass
class UnitPruner(Callback):
    """Scores the units of some structures at each step, and removes the lowest at some of them.

    What has gone stays gone. How many units each structure loses in the end is solved anew at each
    event, by the scores so far; an answer by which one would lose fewer than it has lost already
    is passed over, and the one before stands.

    Attributes:
        program: the dense program.
        pruning: what to remove, and when.
        structures: those that may lose units.
        scores: structure name to the average of each unit's scores.
        gone: structure name to which units have gone.
        counts: structure name to how many go in the end, as last solved.
        events: what has happened.
        notes: what people should know.
    """

    program: Program = field(repr=False)
    pruning: Pruning
    structures: Sequence[Structure]
    scores: dict[str, FloatArray] = field(default_factory=dict)
    gone: dict[str, Gone] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """What has gone so far."""
        return plan_of(self.program, self.gone)

    @property
    def finished(self) -> bool:
        """Whether everything that is to go has gone."""
        return bool(self.events) and self.events[-1].share == 1

    def identity(self) -> Any:
        """The goal, and when units go."""
        return {"loraprune": self.pruning.identity()}

    def attach(self, run: Run) -> None:
        """Begin without scores, and with nothing gone."""
        self._trainable, self._everyone = run.trainable, run.everyone
        self._steps = run.order.steps
        self._due = frozenset(self.pruning.schedule.events(self._steps))
        self._members = members_of(self.program, self.structures, run.trainable.adapted)
        self.scores = {s.name: np.zeros(shape_of(s)) for s in self.structures}
        self.gone = {s.name: np.zeros(shape_of(s), dtype=np.bool_) for s in self.structures}
        self.counts, self.events, self.notes = {}, [], []
        self._watch(self.pruning.gradient == "weight")

    @torch.no_grad()
    def on_gradients(self, step: int, scale: float) -> None:
        """Score the units by the gradients of the mean loss.

        Raises:
            TrainingError: a gradient or a weight is no number; the parameter is named.
        """
        if self.finished:
            return
        found = {name: np.zeros_like(score) for name, score in self.scores.items()}
        for parameter, members in self._members.items():
            sums = self._sums(parameter, members, step, scale)
            for member in members:
                found[member.structure] += member.shares(sums[member.dim])
        part = self.pruning.average
        for name, score in found.items():
            self.scores[name] = part * self.scores[name] + (1 - part) * score

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Remove units, if it is time."""
        done = step + 1
        if done not in self._due:
            return False
        share = self.pruning.schedule.share(done, self._steps)
        self._solve()
        before = self._removed
        for s in self.structures:
            gone = self.gone[s.name]
            count = so_far(share, self.counts[s.name], _in_row(gone))
            self.gone[s.name] = lowest(self.scores[s.name], gone, count)
        self.events.append(Event(done, share, self._removed))
        if self._removed == before:
            return False
        self._trainable.remove(zeros_of(self.program, self.plan), optimizer)
        if self.finished:
            self._watch(False)
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Scores, what has gone, and when."""
        found = {}
        for name, score in self.scores.items():
            found[f"score/{name}"] = torch.from_numpy(score)
            found[f"gone/{name}"] = torch.from_numpy(self.gone[name])
        counts = [self.counts.get(s.name, -1) for s in self.structures]
        events = [(e.step, e.removed) for e in self.events]
        found["counts"] = torch.tensor(counts, dtype=torch.int64)
        found["events"] = torch.tensor(events, dtype=torch.int64).reshape(-1, 2)
        return found

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Remove again what had gone."""
        del step
        for name in self.scores:
            self.scores[name] = tensors[f"score/{name}"].numpy()
            self.gone[name] = tensors[f"gone/{name}"].numpy()
        counts = zip(self.structures, tensors["counts"].tolist(), strict=True)
        self.counts = {s.name: count for s, count in counts if count >= 0}
        self.events = [
            Event(at, self.pruning.schedule.share(at, self._steps), removed)
            for at, removed in tensors["events"].tolist()
        ]
        self._trainable.remove(zeros_of(self.program, self.plan))
        if self.finished:
            self._watch(False)

    @property
    def _removed(self) -> int:
        return sum(int(gone.sum()) for gone in self.gone.values())

    def _solve(self) -> None:
        """How many units of each structure are to go in the end."""
        score = Averaged(self._trainable.adapted, self.scores, self.gone)
        plan = solved(self.program, self.pruning, score, self.notes)
        counts = {s.name: wanted(s, plan) for s in self.structures}
        if all(_in_row(self.gone[name]) <= count for name, count in counts.items()):
            self.counts = counts

    def _sums(
        self, parameter: str, members: Sequence[Member], step: int, scale: float
    ) -> Mapping[int, FloatArray]:
        """The importance of a weight's elements, summed up for each dimension that units lie in."""
        adapter = self._trainable.adapter(parameter)
        original = self._trainable.original(parameter)
        weight = adapter.effective(original, adapter.a, adapter.b, adapter.removed)
        if self.pruning.gradient == "weight":
            gradient = self._own_gradient(parameter, weight) * scale
        else:
            da, db = (
                torch.zeros_like(x) if x.grad is None else x.grad * scale
                for x in (adapter.a, adapter.b)
            )
            matrices = estimated(adapter.a, adapter.b, da, db)
            gradient = adapter.layout.restored(matrices, weight.shape)
        sums = marginals((gradient, weight), importance, {m.dim for m in members})
        if not all(np.isfinite(x).all() for x in sums.values()):
            what = "weight" if not bool(weight.isfinite().all()) else "gradient"
            raise TrainingError(
                f"a {what} is NaN or infinite, so that units can't be scored",
                where=f"{parameter}, step {step + 1}",
                hint="use a lower learning rate, or look for errors in the data",
            )
        return sums

    def _own_gradient(self, parameter: str, weight: Tensor) -> Tensor:
        """The gradient of a weight over all processes, which no optimiser takes."""
        adapter = self._trainable.adapter(parameter)
        holder = torch.zeros_like(weight, requires_grad=True)
        gradient = torch.zeros_like(weight) if adapter.gradient is None else adapter.gradient
        adapter.gradient = None
        holder.grad = gradient
        self._everyone.sum_gradients([holder])  # in place
        return gradient

    def _watch(self, wanted: bool) -> None:
        for parameter in self._members:
            adapter = self._trainable.adapter(parameter)
            adapter.watched, adapter.gradient = wanted, None


def _in_row(gone: Gone) -> int:
    """How many units have gone, of each row."""
    return int(np.count_nonzero(np.atleast_2d(gone)[0]))
