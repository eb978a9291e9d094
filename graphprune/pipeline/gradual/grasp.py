"""The pass ``grasp``: gates on frozen weights choose units, on the budget at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

from graphprune.ir.torch.program import Program
from graphprune.passes.protocol import State
from graphprune.pipeline.gradual.gated import ByGates
from graphprune.training import Training
from graphprune.training.core.options import Count, LossName, NotNegative, Positive, Share
from graphprune.training.domains.options import Domains
from graphprune.training.gated import SMALL, Given, Solve
from graphprune.training.gates.gates import Gated
from graphprune.training.grasp import Grasped, Grasping, grasp


@dataclass(frozen=True)
class Grasp(ByGates[Grasped]):
    """Choose units by gates on frozen weights, which meet the budget at each step (GRASPrune).

    Exactly one of remove, target and shape is given. No weight trains: what does are the scores of
    units, and in the end the scales of those that stay.

    Attributes:
        remove: role, or selector, to the fraction of the units of each structure that goes.
        target: a budget: params, macs or bytes, a fraction or a whole number.
        shape: role to exact size.
        whole: selectors of structures that stay whole.
        minimum: units that stay in every structure, or the fraction of them.
        uniform: whether every layer loses as much; otherwise the scores decide.
        score: begin in the order of this score rather than with all units alike.
        score_lr: the highest learning rate of scores, which begin between 0 and 1.
        scale_lr: that of the scales of units that stay.
        scaling: share of the steps, the last ones, in which the choice stands and scales train.
        every: steps between two solutions of an uneven goal.
        domains: how the shares of a mixture's parts follow their losses; None for fixed shares.
        loss: see `graphprune.training.Training`; without one the cross-entropy.
        tokens: see there.
        steps: see there.
        epochs: see there.
        batch: see there.
        micro_batch: see there.
        warmup: see there.
        temperature: see there.
        precision: see there.
        checkpointing: see there.
        seed: see there.
    """

    name: ClassVar[str] = "grasp"
    stage: ClassVar[str] = "choosing units by gates"
    doing: ClassVar[str] = "chose units by gates"
    remove: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    shape: Mapping[str, Any] | None = None
    whole: tuple[str, ...] = ()
    minimum: Any = 1
    uniform: bool = True
    score: str | None = "taylor"
    score_lr: NotNegative = Grasping.score_lr
    scale_lr: NotNegative = Grasping.scale_lr
    scaling: Share = Grasping.scaling
    every: Count = Grasping.every
    domains: Domains | None = None
    loss: LossName | None = None
    tokens: Count | None = None
    steps: Count | None = None
    epochs: Positive | None = None
    batch: Count = 8
    micro_batch: Count | None = None
    warmup: Share = 0.1
    temperature: Positive = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RecipeError: one is of another type or out of its range, or two contradict each other.
        """
        self.training, self.goal  # noqa: B018  (their own checks)

    @cached_property
    def training(self) -> Training:
        """How it trains."""
        own = {f.name for f in fields(self)}
        options = {f.name: getattr(self, f.name) for f in fields(Training) if f.name in own}
        return Training(train="frozen", **options)

    def choose(
        self,
        program: Program,
        data: Any,
        gated: Sequence[Gated],
        training: Training,
        solve: Solve | None,
        given: Given,
    ) -> Grasped:
        """Train scores and scales; see `graphprune.training.grasp.grasp`."""
        options = Grasping(self.score_lr, self.scale_lr, self.scaling, self.every)
        return grasp(program, data, gated, training, options, solve=solve, **given)

    def told(self, found: Grasped) -> tuple[tuple[str, ...], str, Mapping[str, Any]]:
        """What was exchanged, and which scales are small."""
        small = sum(found.small.values())
        notes = (f"{small} units that stay have scales below {SMALL}",) if small else ()
        meanwhile = f", which exchanged {found.exchanged:,} of them"
        return notes, meanwhile, {"exchanged": found.exchanged}

    def describe(self, state: State) -> str:
        """One line."""
        return f"choose by gates which units of {len(state.plan.kept_units)} structures stay"
