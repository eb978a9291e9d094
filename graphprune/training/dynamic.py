"""Dynamic batch loading: shares of domains follow how far each is from its reference loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program
from graphprune.training.core.samples import Tensors
from graphprune.training.domains.order import DomainOrder, Exhausted
from graphprune.training.domains.reference import Given, reference_losses
from graphprune.training.domains.shares import Rule, updated
from graphprune.training.identity import model_digest
from graphprune.training.model.objective import Objective
from graphprune.training.model.student import student_of
from graphprune.training.run import Callback, Run

SOURCE = "source"
"""The losses of the model that trains, as they are before it does."""

Reference: TypeAlias = Given | Program
"""See `graphprune.training.domains.reference.Given`; or a model whose losses are aimed at, or
`SOURCE`."""


@dataclass(frozen=True)
class Measured:
    """What was found at a step: losses and new shares, by domain."""

    step: int
    losses: Mapping[str, float]
    shares: Mapping[str, float]


@dataclass
class DynamicBatches(Callback):
    """Domains to train on; give `data` as the data, and this as a callback.

    Attributes:
        domains: name to token windows ``[windows, length]``, all of one length.
        held_out: name to windows that losses are measured on.
        reference: the losses that are aimed at.
        shares: name to the share that each domain begins with; None for those of the windows.
        every: steps between two measurements.
        rule: see `graphprune.training.domains.shares.updated`.
        step_size: see there.
        floor: see there.
        exhausted: see `graphprune.training.domains.order.DomainOrder`.
        size: parameters of the model that is to come out, which a scaling law needs.
        history: what was measured.
    """

    domains: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    reference: Reference = SOURCE
    shares: Mapping[str, float] | None = None
    every: int = 50
    rule: Rule = "paper"
    step_size: float = 1.0
    floor: float = 0.0
    exhausted: Exhausted = "repeat"
    size: int | None = None
    history: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the domains.

        Raises:
            TrainingError: names or lengths of windows differ, or a number is out of its range.
        """
        self.names = tuple(self.domains)
        for what, given in (("held_out", self.held_out), ("shares", self.shares)):
            if given is not None and set(given) != set(self.names):
                raise TrainingError(
                    f"{what} and the domains have other names",
                    why=f"{', '.join(sorted(given))} and {', '.join(sorted(self.names))}",
                )
        if len({tuple(t.shape[1:]) for t in self.domains.values()}) != 1:
            raise TrainingError("windows of all domains need one length")
        if not 0 <= self.floor * len(self.names) <= 1 or self.every < 1:
            raise TrainingError(
                "floor is at most 1 / domains, and every at least 1",
                why=f"floor {self.floor} of {len(self.names)} domains, every {self.every}",
            )
        sizes = {name: len(t) for name, t in self.domains.items()}
        begun = self.shares or {n: size / sum(sizes.values()) for n, size in sizes.items()}
        first = torch.tensor([begun[n] for n in self.names], dtype=torch.float64)
        if not bool((first >= 0).all()) or not math.isclose(float(first.sum()), 1, abs_tol=1e-6):
            raise TrainingError("shares of domains are not negative, and add up to 1")
        self._sizes = tuple(sizes[n] for n in self.names)
        self._now = first / first.sum()
        self._seen = torch.zeros(len(self.names), dtype=torch.int64)
        self._aims: tuple[float, ...] = ()

    @property
    def data(self) -> Tensor:
        """All windows, domain by domain."""
        return torch.cat([self.domains[name] for name in self.names])

    def identity(self) -> Any:
        """The options and the held-out windows."""
        held = [Tensors(self.held_out[name]).digest() for name in self.names]
        aims: list[Any]
        if isinstance(self.reference, Program):
            aims = ["dense", model_digest(self.reference)]
        elif self.reference == SOURCE:
            aims = [SOURCE]
        else:
            aims = list(reference_losses(self.reference, self.names, self.size))
        return [
            self.names, self._sizes, held, aims, dict(self.shares or {}), self.every, self.rule,
            self.step_size, self.floor, self.exhausted,
        ]  # fmt: skip

    def attach(self, run: Run) -> None:
        """Take the place of the run's order.

        Raises:
            TrainingError: the run has other data, or a reference is missing.
        """
        order = run.order
        if len(run.samples) != sum(self._sizes):
            raise TrainingError(
                "the run trains on something else than these domains",
                why=f"it has {len(run.samples)} windows, and they have {sum(self._sizes)}",
                hint="give .data as the data",
            )
        self._run = run
        run.order = self._order = DomainOrder(
            order.count, order.total, order.batch, order.seed, order.first, order.last,
            names=self.names, sizes=self._sizes, shares=self._now, seen_of=self._seen,
            exhausted=self.exhausted,
        )  # fmt: skip
        if isinstance(self.reference, Program):
            self._aims = tuple(self._dense(self.reference).values())
        elif self.reference == SOURCE:
            self._aims = tuple(self._measured().values())
        else:
            self._aims = reference_losses(self.reference, self.names, self.size)

    def tensors(self) -> dict[str, Tensor]:
        """The shares, how many samples of each domain were seen, and what was measured."""
        rows = [[m.step, *m.losses.values(), *m.shares.values()] for m in self.history]
        history = torch.tensor(rows, dtype=torch.float64)
        return {"shares": self._now, "seen": self._seen, "history": history}

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the shares, and with what was measured."""
        del step
        self._now.copy_(tensors["shares"])
        self._seen.copy_(tensors["seen"])
        self.history.clear()
        for at, *row in tensors["history"].tolist():
            losses, shares = row[: len(self.names)], row[len(self.names) :]
            named = [dict(zip(self.names, own, strict=True)) for own in (losses, shares)]
            self.history.append(Measured(int(at), *named))

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Count what was seen, and measure where it is time to."""
        del optimizer
        self._order.advance(step)
        if (step + 1) % self.every:
            return False
        losses = self._measured()
        new = updated(
            self._now.tolist(), list(losses.values()), self._aims,
            rule=self.rule, step_size=self.step_size, floor=self.floor,
        )  # fmt: skip
        self._now.copy_(torch.tensor(new, dtype=torch.float64))
        shares = dict(zip(self.names, new, strict=True))
        self.history.append(Measured(step + 1, losses, shares))
        return False

    @property
    def aims(self) -> Mapping[str, float]:
        """The reference losses, once the run has begun."""
        return dict(zip(self.names, self._aims, strict=True))

    @property
    def repeated(self) -> Mapping[str, float]:
        """How often the windows of each domain were seen, where that is more than once."""
        times = {n: seen / size for n, seen, size in zip(
            self.names, self._seen.tolist(), self._sizes, strict=True)}  # fmt: skip
        return {name: often for name, often in times.items() if often > 1}

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Domains whose loss was no number at some measurement: they kept their shares."""
        found = {n for m in self.history for n, loss in m.losses.items() if not math.isfinite(loss)}
        return tuple(sorted(found))

    @torch.no_grad()
    def _measured(self, objective: Objective | None = None) -> dict[str, float]:
        """The mean loss of a token of each domain's held-out windows, in every process alike.

        Args:
            objective: a model with its loss; None for the one that trains.
        """
        run, found = self._run, {}
        everyone, objective = run.everyone, objective or run.objective
        size = run.training.micro_batch or run.training.batch
        for name in self.names:
            total, count = 0.0, 0.0
            parts = torch.split(self.held_out[name], size)
            # Each process has as many passes: where weights are shared, all take part in each.
            for turn in range(-(-len(parts) // everyone.world)):
                number = turn * everyone.world + everyone.rank
                windows = parts[min(number, len(parts) - 1)]
                loss, tokens = objective(run.feed(windows).to(everyone.device))
                if number < len(parts):
                    total, count = total + float(loss), count + float(tokens)
            total, count = everyone.total(total, count)
            found[name] = total / count if count else math.nan
        return found

    def _dense(self, dense: Program) -> dict[str, float]:
        """The losses of another model, by the loss that is trained for."""
        device = self._run.everyone.device
        student = student_of(dense, shared=device.type == "cpu")
        placed = replace(student, module=student.module.to(device), head=None)
        return self._measured(self._run.objective.of(placed))
