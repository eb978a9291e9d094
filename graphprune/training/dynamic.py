"""Dynamic batch loading: shares of domains follow how far each is from its reference loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from graphprune.errors import TrainingError
from graphprune.files.json import parse_json
from graphprune.training.core.samples import Tensors
from graphprune.training.domains.order import DomainOrder, Exhausted
from graphprune.training.domains.shares import Rule, updated
from graphprune.training.run import Callback, Run

Reference = Mapping[str, float] | Sequence[float] | str | Path
"""Losses by domain, or in the order of the domains; a JSON file of either; or "source", for those
of the model before it trains."""


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
        history: what was measured in this process.
    """

    domains: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    reference: Reference = "source"
    shares: Mapping[str, float] | None = None
    every: int = 50
    rule: Rule = "paper"
    step_size: float = 1.0
    floor: float = 0.0
    exhausted: Exhausted = "repeat"
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
        given = self.reference if isinstance(self.reference, str) else None
        aims = [given] if given == "source" else list(_given(self.reference, self.names))
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
        if self.reference == "source":
            self._aims = tuple(self._measured().values())
        else:
            self._aims = _given(self.reference, self.names)

    def tensors(self) -> dict[str, Tensor]:
        """The shares, and how many samples of each domain were seen."""
        return {"shares": self._now, "seen": self._seen}

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
    def unmeasured(self) -> tuple[str, ...]:
        """Domains whose loss was no number at some measurement: they kept their shares."""
        found = {n for m in self.history for n, loss in m.losses.items() if not math.isfinite(loss)}
        return tuple(sorted(found))

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        """The mean loss of a token of each domain's held-out windows, in every process alike."""
        run, found = self._run, {}
        size = run.training.micro_batch or run.training.batch
        for name in self.names:
            total, count = 0.0, 0.0
            for windows in torch.split(self.held_out[name], size):
                loss, tokens = run.objective(run.feed(windows).to(run.everyone.device))
                total, count = total + float(loss), count + float(tokens)
            found[name] = total / count if count else math.nan
        return found


def _given(reference: Reference, names: tuple[str, ...]) -> tuple[float, ...]:
    """Reference losses in the order of the domains.

    Raises:
        TrainingError: one is missing, or no number.
    """
    read: Any = reference
    if isinstance(reference, str | Path):
        try:
            read = parse_json(Path(reference).read_bytes())
        except (OSError, ValueError) as error:
            raise TrainingError(
                "reference losses can't be read", where=str(reference), why=str(error)
            ) from error
    if isinstance(read, Mapping):
        missing = sorted(set(names) - set(read))
        values = [read[name] for name in names if name in read]
    else:
        values, missing = list(read), [] if len(read) == len(names) else list(names)
    wrong = [v for v in values if not isinstance(v, int | float) or not math.isfinite(v)]
    if missing or wrong:
        raise TrainingError(
            "every domain needs a reference loss",
            why=f"missing: {', '.join(missing)}" if missing else f"{wrong[0]!r} is no number",
            hint='give one for each of this model\'s domains, or reference="source"',
        )
    return tuple(float(v) for v in values)
