"""The pass ``shear``: which units stay is learned by gates while the weights train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from graphprune.ir.torch.program import Program
from graphprune.passes.protocol import State
from graphprune.pipeline.gradual.gated import ByGates
from graphprune.training import Training
from graphprune.training.core.options import NotNegative, Share
from graphprune.training.domains.options import Domains
from graphprune.training.gated import SMALL, Given, Solve
from graphprune.training.gates.gates import Gated
from graphprune.training.learn import Learned, Learning, learn


@dataclass(frozen=True)
class Shear(ByGates[Learned], Training):
    """Learn which units stay by gates while the weights train (LLM-Shearing, Xia et al., 2024).

    Its options are those of `graphprune.training.Training`, and without a loss it is the
    cross-entropy. Exactly one of remove, target and shape is given.

    Attributes:
        remove: role, or selector, to the fraction of the units of each structure that goes.
        target: a budget: params, macs or bytes, a fraction or a whole number.
        shape: role to exact size.
        whole: selectors of structures that stay whole.
        minimum: units that stay in every structure, or the fraction of them.
        uniform: whether every structure of a role loses as much; otherwise gates decide, which are
            held to the share of all of them, or to the cost of the whole model where that is a
            target.
        score: begin with gates in the order of this score rather than all open.
        gate_lr: the highest learning rate of gates, which rises and falls as that of weights.
        multiplier_lr: that of the multipliers that hold gates to the target.
        target_warmup: share of the steps in which the target rises from nothing.
        snap: units that stay are as they were, rather than scaled by their gates.
        domains: how the shares of a mixture's parts follow their losses; None for fixed shares.
    """

    name: ClassVar[str] = "shear"
    stage: ClassVar[str] = "learning which units stay"
    doing: ClassVar[str] = "learned by gates which units stay"
    together: ClassVar[bool] = True
    remove: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    shape: Mapping[str, Any] | None = None
    whole: tuple[str, ...] = ()
    minimum: Any = 1
    uniform: bool = True
    score: str | None = None
    gate_lr: NotNegative = 1.0
    multiplier_lr: NotNegative = 1.0
    target_warmup: Share = 0.2
    snap: bool = False
    domains: Domains | None = None

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RecipeError: one is of another type or out of its range, or there is not one goal.
        """
        super().__post_init__()
        self.goal  # noqa: B018  (its own check)

    @cached_property
    def training(self) -> Training:
        """How it trains."""
        return Training(**{f.name: getattr(self, f.name) for f in fields(Training)})

    def choose(
        self,
        program: Program,
        data: Any,
        gated: Sequence[Gated],
        training: Training,
        solve: Solve | None,
        given: Given,
    ) -> Learned:
        """Train gates and weights; see `graphprune.training.learn.learn`."""
        by_score = self.score is not None
        options = Learning(
            self.gate_lr, self.multiplier_lr, self.target_warmup, by_score, self.snap
        )
        budget = self.goal.budget(program)
        return learn(program, data, gated, training, options, solve=solve, budget=budget, **given)

    def told(self, found: Learned) -> tuple[tuple[str, ...], str, Mapping[str, Any]]:
        """What gates expect, and which are small."""
        small = sum(found.small.values())
        note = (
            f"{small} units that stay have gates below {SMALL}: they do little, and training what "
            "is left (recover) may give them more"
        )
        return (note,) if small else (), "", {"expected": dict(found.expected)}

    def describe(self, state: State) -> str:
        """One line."""
        return f"learn by gates which units of {len(state.plan.kept_units)} structures stay"
