"""Which units stay, learned by gates on frozen weights that meet the budget at each step.

After GRASPrune (2026, arXiv:2604.19398), whose idea this is, not its code: scores of units train
through their projection on the budget; then the scales of the units that stay train, and are
multiplied into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from graphprune.ir.torch.program import Program
from graphprune.training.core.options import Training
from graphprune.training.gated import Chosen, Form, Given, Solve, form_of, lay, settle, train_gated
from graphprune.training.gates.gates import Gated
from graphprune.training.gates.projected import ProjectedGates
from graphprune.training.run import Callback, Run

_CALM = 1.0
"""What is added to the size of a score's gradients before it is divided by it, in units of their
mean size: a unit that the loss hardly feels moves less than one that it feels."""


@dataclass(frozen=True)
class Grasping:
    """How units are chosen.

    Attributes:
        score_lr: the highest learning rate of scores, which begin between 0 and 1; it rises and
            falls as that of weights does in a training.
        scale_lr: that of the scales of units that stay.
        scaling: share of the steps, the last ones, in which the choice stands and scales train.
        every: steps between two solutions of how many units of each structure stay, where that
            depends on the scores; the best of each structure are found at every step.
    """

    score_lr: float = 0.03
    scale_lr: float = 0.02
    scaling: float = 0.25
    every: int = 1


@dataclass(frozen=True)
class Grasped(Chosen):
    """What was chosen, with the scales of units that stay for gates.

    Attributes:
        exchanged: units that stay now and would have gone at the start.
    """

    exchanged: int


def grasp(
    program: Program,
    data: Any,
    gated: Sequence[Gated],
    training: Training | None = None,
    options: Grasping | None = None,
    *,
    solve: Solve | None = None,
    **given: Unpack[Given],
) -> Grasped:
    """Choose units by gates while all weights stay as they are.

    Args:
        program: a dense model; not changed.
        data: see `graphprune.training.recover`, as for everything that isn't named here.
        gated: structures of the program with the numbers of units that are to stay.
        training: options; no weight trains, and without a loss it is the cross-entropy.
        options: of the gates.
        solve: how many units of each structure stay, by the scores; None for the numbers of
            `gated` throughout.
        given: masks, teacher, loss, callbacks, state and progress of `graphprune.training.recover`.

    Raises:
        PlanError: a structure offers no place for gates.
        TrainingError: see `graphprune.training.recover`; or gates don't do on this model what a
            cut does.
    """
    options = options or Grasping()
    training = replace(training or Training(), train="frozen")
    form = form_of(program, gated, given.get("masks") or {}, training)
    own = _Choosing(form, options, training, solve)
    found = train_gated(form, data, training, own, given)
    chosen = settle(program, form, own.gates.settled(), found)
    return Grasped(**vars(chosen), exchanged=own.exchanged)


class _Choosing(Callback):
    """Scores, their projection on the budget, and scales."""

    def __init__(
        self, form: Form, options: Grasping, training: Training, solve: Solve | None
    ) -> None:
        self.form, self.options, self.seed, self.solve = form, options, training.seed, solve
        self.gates: ProjectedGates
        self.choosing = 0
        self._counts = torch.tensor([one.count for one in form.gated])
        self._first: dict[str, Tensor] = {}

    def identity(self) -> Any:
        """The options, the structures and how many units of each stay."""
        uneven = self.solve is not None
        return {"grasp": asdict(self.options), "uneven": uneven, "structures": self.form.identity}

    def attach(self, run: Run) -> None:
        """Lay gates on the model, and project the scores for the first step."""
        self.gates = ProjectedGates.of(self.form.gated, run.everyone.device)
        steps = run.order.steps
        self.choosing = steps - min(steps - 1, round(self.options.scaling * steps))
        lay(run, self.gates, self.form, self.seed)
        self._project(anew=True)
        self._first = {name: z.clone() for name, z in self.gates.open.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Scores and scales."""
        found = {f"scores/{name}": a for name, a in self.gates.scores.items()}
        return found | {f"scales/{name}": a for name, a in self.gates.scales.items()}

    def groups(self) -> list[dict[str, Any]]:
        """Scores, and scales."""
        scores, scales = self.gates.scores.values(), self.gates.scales.values()
        return [
            {"params": list(scores), "peak": self.options.score_lr, "eps": _CALM},
            {"params": list(scales), "peak": self.options.scale_lr},
        ]

    def tensors(self) -> dict[str, Tensor]:
        """How many units stay; which they are follows from the scores."""
        return {"counts": self._counts}

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Project the scores again."""
        super().restore(step, tensors)
        self._project(anew=False)
        self.gates.chosen = step >= self.choosing

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Put the gradients of a role's scores in units of their mean size."""
        chosen = step >= self.choosing
        for idle in (self.gates.scores if chosen else self.gates.scales).values():
            idle.grad = None  # processes may have made one of zeros
        roles: dict[str, list[Tensor]] = {}
        for name, a in self.gates.scores.items():
            if a.grad is not None:
                roles.setdefault(self.gates.gated[name].structure.role, []).append(a.grad)
        for gradients in roles.values():
            size = torch.cat(gradients).square().mean().sqrt()
            if size > 0:
                for gradient in gradients:
                    gradient.div_(size)

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Project the scores; once they have trained, the choice stands."""
        del optimizer
        done = step + 1
        if done <= self.choosing:
            self._project(anew=done % self.options.every == 0 or done == self.choosing)
            self.gates.chosen = done == self.choosing
        self.gates.clamp()
        return False

    @property
    def exchanged(self) -> int:
        """Units that stay and would have gone at the start."""
        opened = [(self.gates.open[name] > z).sum() for name, z in self._first.items()]
        return int(sum(opened))

    def _project(self, *, anew: bool) -> None:
        names = list(self.gates.gated)
        if anew and self.solve is not None:
            counts = self.solve({name: self.gates.ranking(name) for name in names})
            self._counts.copy_(torch.tensor([counts[name] for name in names]))
        self.gates.project(dict(zip(names, self._counts.tolist(), strict=True)))
