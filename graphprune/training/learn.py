"""Which units stay, learned by gates while the weights train (LLM-Shearing, Xia et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from graphprune.ir.torch.program import Program
from graphprune.training.core.options import Training
from graphprune.training.gated import Chosen, Form, Given, Solve, form_of, lay, settle, train_gated
from graphprune.training.gates.concrete import ConcreteGates, begun
from graphprune.training.gates.cut import kept
from graphprune.training.gates.expected import Budget, saved_share
from graphprune.training.gates.gates import Gated
from graphprune.training.gates.hard_concrete import settled
from graphprune.training.gates.lagrangian import penalty, warmed
from graphprune.training.run import Callback, Run

BUDGET = "budget"


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
class Learned(Chosen):
    """What gates have learned.

    Attributes:
        expected: structure to the share of its units that gates alone would have removed.
    """

    expected: Mapping[str, float]


def learn(
    program: Program,
    data: Any,
    gated: Sequence[Gated],
    training: Training | None = None,
    learning: Learning | None = None,
    *,
    solve: Solve | None = None,
    budget: Budget | None = None,
    **given: Unpack[Given],
) -> Learned:
    """Train weights together with gates of units, and choose the units by their gates.

    Args:
        program: a dense model; not changed.
        data: see `graphprune.training.recover`, as for everything that isn't named here.
        gated: structures of the program with the numbers of units that are to stay.
        training: options; without a loss it is the cross-entropy.
        learning: options of the gates.
        solve: how many units of each structure stay, by their gates; None for the numbers of
            `gated`. With it, a role is held to the share of all its units together.
        budget: what the whole model is held to in place of shares of units.
        given: masks, teacher, loss, callbacks, state and progress of `graphprune.training.recover`.

    Raises:
        PlanError: a structure offers no place for gates.
        TrainingError: see `graphprune.training.recover`; or gates don't do on this model what a
            cut does.
    """
    learning, training = learning or Learning(), training or Training()
    form = form_of(program, gated, given.get("masks") or {}, training)
    own = _Learning(form, learning, training, solve, budget)
    found = train_gated(form, data, training, own, given)
    chosen = settle(program, form, own.settle(), found, fold=not learning.snap)
    return Learned(**vars(chosen), expected=own.expected())


class _Learning(Callback):
    """Gates and their multipliers, beside the weights of a run."""

    def __init__(
        self,
        form: Form,
        options: Learning,
        training: Training,
        solve: Solve | None,
        budget: Budget | None,
    ) -> None:
        self.form, self.options, self.seed = form, options, training.seed
        self.solve, self.budget = solve, budget
        self.roles: dict[str, list[str]] = {}
        for one in form.gated:
            self.roles.setdefault(one.structure.role, []).append(one.structure.name)
        self.gates: ConcreteGates
        self.multipliers: dict[str, nn.Parameter] = {}
        self.steps = 1

    def identity(self) -> Any:
        """The options, the structures and their targets."""
        budget = None if self.budget is None else asdict(self.budget)
        uneven = self.solve is not None
        return {
            "gates": asdict(self.options), "structures": self.form.identity,
            "budget": budget, "uneven": uneven,
        }  # fmt: skip

    def attach(self, run: Run) -> None:
        """Lay gates on the model."""
        draw, device = run.trainable.draw, run.everyone.device
        self.gates = begun(self.form.gated, self.seed, draw, by_score=self.options.by_score)
        for name, a in self.gates.locations.items():
            self.gates.locations[name] = nn.Parameter(a.detach().to(device))
        for held in self.roles if self.budget is None else (BUDGET,):
            for order in (1, 2):
                self.multipliers[f"{held}/{order}"] = nn.Parameter(torch.zeros((), device=device))
        self.steps = run.order.whole
        lay(run, self.gates, self.form, self.seed)

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
        for held, (shares, targets) in self._held().items():
            value = penalty(
                shares,
                [warmed(target, step, rising) for target in targets],
                self.multipliers[f"{held}/1"],
                self.multipliers[f"{held}/2"],
            )
            total = value if total is None else total + value
        if total is not None:
            total.backward()  # type: ignore[no-untyped-call]

    def _held(self) -> dict[str, tuple[list[Tensor], list[float]]]:
        """What each pair of multipliers holds: expected shares, and those that are wanted."""
        gates = self.gates
        if self.budget is not None:
            saved = saved_share(self.form.program, gates.gated, gates.chances, self.budget.resource)
            return {BUDGET: ([saved], [self.budget.share])}
        found = {}
        for role, names in self.roles.items():
            shares = [gates.closed_share(name) for name in names]
            targets = [gates.gated[name].target for name in names]
            if self.solve is not None:
                among = [int(gates.gated[name].free.sum()) for name in names]
                parts = [count / sum(among) for count in among]
                shares = [torch.stack([s * p for s, p in zip(shares, parts, strict=True)]).sum()]
                targets = [sum(t * p for t, p in zip(targets, parts, strict=True))]
            found[role] = (shares, targets)
        return found

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Keep gates where they have gradients."""
        del step, optimizer
        self.gates.clamp()
        return False

    @torch.no_grad()
    def settle(self) -> dict[str, Tensor]:
        """The gates in the end: exact numbers of them are open."""
        found, where = {}, {}
        for name, one in self.gates.gated.items():
            a = self.gates.locations[name].detach().double().cpu()
            wide = torch.where(one.free, a, torch.inf)
            where[name] = wide.view(one.rows, one.structure.size).numpy()
        counts = {name: one.count for name, one in self.gates.gated.items()}
        if self.solve is not None:
            counts = dict(self.solve(where))
        for name, one in self.gates.gated.items():
            a = self.gates.locations[name].detach().double().cpu()
            z = torch.where(one.free, settled(a), 1.0)
            open_ = torch.zeros(one.rows, one.structure.size, dtype=torch.bool)
            for row in range(one.rows):
                scores = None if one.scores is None else one.scores[row]
                open_[row, list(kept(where[name][row], counts[name], scores))] = True
            found[name] = torch.where(open_.flatten(), z, 0.0)
        return found

    @torch.no_grad()
    def expected(self) -> dict[str, float]:
        """The share of units that gates alone would remove."""
        return {n: float(self.gates.closed_share(n)) for n in self.gates.gated}
