"""Which units stay, learned by gates while the weights train (LLM-Shearing, Xia et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from graphprune.errors import TrainingError
from graphprune.ir.torch.program import Program
from graphprune.plan.kept import Units
from graphprune.plan.plan import Plan
from graphprune.rewrite.apply import apply
from graphprune.rewrite.retrace import retrace
from graphprune.streaming.torch.weights import apply_weights
from graphprune.training.core.options import Training
from graphprune.training.gates.attach import attach
from graphprune.training.gates.cut import kept
from graphprune.training.gates.gates import Gated, Gates, begun, folded
from graphprune.training.gates.hard_concrete import settled
from graphprune.training.gates.lagrangian import penalty, warmed
from graphprune.training.gates.places import Places, places_of
from graphprune.training.model.objective import OwnLoss
from graphprune.training.proof import check_closed, check_open
from graphprune.training.recover import RecoveredProgram, Saving, recover
from graphprune.training.run import Callback, Progress, Run

SMALL = 0.1
"""Gates of units that stay below which they are told of."""


@dataclass(frozen=True)
class Learning:
    """How gates are learned.

    Attributes:
        gate_lr: the highest learning rate of gates, which rises and falls as that of weights.
        multiplier_lr: that of the multipliers of the penalty.
        target_warmup: share of the steps in which the target rises from nothing.
        by_score: begin with gates in the order of the units' scores rather than all open.
        snap: units that stay are as they were, rather than scaled by their gates.
    """

    gate_lr: float = 1.0
    multiplier_lr: float = 1.0
    target_warmup: float = 0.2
    by_score: bool = False
    snap: bool = False


@dataclass(frozen=True)
class Learned:
    """What gates have learned.

    Attributes:
        program: the dense program with the weights that were trained, gates multiplied in.
        plan: the units that stay, in exact numbers.
        gates: structure to the gates of its units in the end, ``[rows * size]``.
        expected: structure to the share of its units that gates alone would have removed.
        small: structure to the number of units that stay with a gate below `SMALL`.
        recovered: what training has made.
    """

    program: Program
    plan: Plan
    gates: Mapping[str, Tensor] = field(repr=False)
    expected: Mapping[str, float]
    small: Mapping[str, int]
    recovered: RecoveredProgram = field(repr=False)


def learn(
    program: Program,
    data: Any,
    gated: Sequence[Gated],
    training: Training | None = None,
    learning: Learning | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: Program | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[Callback] = (),
    state: Saving | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Learned:
    """Train weights together with gates of units, and choose the units by their gates.

    Args:
        program: a dense model; not changed.
        data: see `graphprune.training.recover`, as for everything that isn't named here.
        gated: structures of the program with the numbers of units that are to stay.
        training: options; without a loss it is the cross-entropy.
        learning: options of the gates.
        masks: see `graphprune.training.recover`.
        teacher: see `graphprune.training.recover`.
        loss: see `graphprune.training.recover`.
        callbacks: what else takes part.
        state: see `graphprune.training.recover`.
        progress: see `graphprune.training.recover`.

    Raises:
        PlanError: a structure offers no place for gates.
        TrainingError: see `graphprune.training.recover`; or gates don't do on this model what a
            cut does.
    """
    learning, training = learning or Learning(), training or Training()
    if training.fsdp:
        raise TrainingError(
            "gates can't be learned with fsdp",
            why="each process needs all gates, and the whole of the weights that they scale",
            hint="leave fsdp out: processes share the samples of each step",
        )
    inner, places, gated = _trained_form(program, gated)
    begun_with = {n: inner.weights[n].detach().masked_fill(~m, 0) for n, m in (masks or {}).items()}
    start = apply_weights(inner, begun_with) if begun_with else inner
    own = _Learning(start, tuple(gated), places, learning, training)
    found = recover(
        replace(inner, module=None) if places.noticing else inner,
        data,
        training.settled(teacher=teacher is not None, causal=program.is_causal),
        masks=masks,
        teacher=teacher,
        loss=loss,
        callbacks=(*callbacks, own),  # they see the model before it has gates
        state=state,
        progress=progress,
    )
    gates = own.settle()
    plan = Plan(
        program.fingerprint,
        {one.structure.name: _units(one, gates[one.structure.name]) for one in gated},
        {one.structure.name: one.structure.size for one in gated},
    )
    # What goes is left as it is: it is cut, and zeros would look like those of a mask.
    open_ = {name: torch.where(z > 0, z, 1.0) for name, z in gates.items()}
    new = dict(found.weights)
    for name, on in ({} if learning.snap else places.by_parameter).items():
        new[name] = folded(new.get(name, inner.weights[name].detach()), on, open_)
    new = {name: weight.to(program.weights[name].dtype) for name, weight in new.items()}
    return Learned(
        apply_weights(program, new), plan.noted(program), gates, own.expected(),
        _small(gates), found,
    )  # fmt: skip


def _trained_form(
    program: Program, gated: Sequence[Gated]
) -> tuple[Program, Places, Sequence[Gated]]:
    """The program whose graph gates are laid on, with their places.

    Where something notices units it is the graph itself that trains, in the dtype of its trace.
    """
    places = places_of(program, [one.structure for one in gated])
    halves = (torch.float16, torch.bfloat16)
    half = any(program.weights[name].dtype in halves for name in program.trainable)
    if not (places.noticing and half and program.module is not None):
        return program, places, gated
    wide = retrace(apply(program, Plan(program.fingerprint, {})), torch.float32)
    if wide.fingerprint != program.fingerprint:
        raise TrainingError(
            "the model has other structures in float32",
            hint="load it in float32, or leave out the roles whose units norms notice",
        )
    gated = [replace(one, structure=wide.by_name[one.structure.name]) for one in gated]
    return wide, places_of(wide, [one.structure for one in gated]), gated


class _Learning(Callback):
    """Gates and their multipliers, beside the weights of a run."""

    def __init__(
        self,
        program: Program,
        gated: tuple[Gated, ...],
        places: Places,
        options: Learning,
        training: Training,
    ) -> None:
        self.program, self.gated, self.places = program, gated, places
        self.options, self.seed = options, training.seed
        self.roles: dict[str, list[str]] = {}
        for one in gated:
            self.roles.setdefault(one.structure.role, []).append(one.structure.name)
        self.gates: Gates
        self.multipliers: dict[str, nn.Parameter] = {}
        self.steps = 1

    def identity(self) -> Any:
        """The options, the structures and their targets."""
        chosen = [
            [one.structure.name, one.rows, one.count, one.removable.tolist(),
             None if one.scores is None else one.scores.tolist()]
            for one in self.gated
        ]  # fmt: skip
        return {"gates": asdict(self.options), "structures": chosen}

    def attach(self, run: Run) -> None:
        """Lay gates on the model, and see that they do what a cut does."""
        self.gates = begun(
            self.gated, self.seed, run.trainable.draw, by_score=self.options.by_score
        )
        device = run.everyone.device
        for name, a in self.gates.locations.items():
            self.gates.locations[name] = nn.Parameter(a.detach().to(device))
        for role in self.roles:
            for order in (1, 2):
                self.multipliers[f"{role}/{order}"] = nn.Parameter(torch.zeros((), device=device))
        self.steps = run.order.whole
        first = run.feed(run.samples.take([0])).to(device)
        before = run.objective.outputs(first)
        attach(run.trainable, self.gates, self.places, self.program)
        check_open(run.objective, self.gates, first, before)
        check_closed(self.program, run.objective, self.gates, first, self.seed)
        self.gates.fixed = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Gates and multipliers."""
        found = {f"gates/{name}": a for name, a in self.gates.locations.items()}
        return found | {f"multipliers/{name}": x for name, x in self.multipliers.items()}

    def groups(self) -> list[dict[str, Any]]:
        """Gates go down, multipliers up."""
        gates, multipliers = self.gates.locations.values(), self.multipliers.values()
        return [
            {"params": list(gates), "peak": self.options.gate_lr},
            {"params": list(multipliers), "peak": self.options.multiplier_lr, "maximize": True},
        ]

    def before_step(self, step: int) -> None:
        """Add the gradients of the penalty."""
        rising = round(self.options.target_warmup * self.steps)
        total: Tensor | None = None
        for role, names in self.roles.items():
            value = penalty(
                [self.gates.closed_share(name) for name in names],
                [warmed(self.gates.gated[name].target, step, rising) for name in names],
                self.multipliers[f"{role}/1"],
                self.multipliers[f"{role}/2"],
            )
            total = value if total is None else total + value
        if total is not None:
            total.backward()  # type: ignore[no-untyped-call]

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Keep gates where they have gradients."""
        del step, optimizer
        self.gates.clamp()
        return False

    @torch.no_grad()
    def settle(self) -> dict[str, Tensor]:
        """The gates in the end: exact numbers of them are open."""
        found = {}
        for name, one in self.gates.gated.items():
            size = one.structure.size
            a = self.gates.locations[name].detach().double().cpu()
            z = torch.where(one.free, settled(a), 1.0)
            where = torch.where(one.free, a, torch.inf).view(one.rows, size).numpy()
            open_ = torch.zeros(one.rows, size, dtype=torch.bool)
            for row in range(one.rows):
                scores = None if one.scores is None else one.scores[row]
                open_[row, list(kept(where[row], one.count, scores))] = True
            found[name] = torch.where(open_.flatten(), z, 0.0)
        return found

    @torch.no_grad()
    def expected(self) -> dict[str, float]:
        """The share of units that gates alone would remove."""
        return {n: float(self.gates.closed_share(n)) for n in self.gates.gated}


def _units(one: Gated, gates: Tensor) -> Units:
    """The units that stay, as a plan has them."""
    rows = tuple(
        tuple(int(i) for i in np.flatnonzero(row))
        for row in gates.view(one.rows, one.structure.size).numpy()
    )
    return rows if one.structure.within is not None else rows[0]


def _small(gates: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {name: int(((z > 0) & (z < SMALL)).sum()) for name, z in gates.items()}
    return {name: count for name, count in counts.items() if count}
