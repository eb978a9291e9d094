"""The pass ``grasp``: gates on frozen weights choose units, on the budget at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from graphprune.calibration.sources.amounts import TRAINING, Amount
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.gradual.goal import Goal
from graphprune.pipeline.steps.recover import each_step, saving
from graphprune.pipeline.steps.traced import as_traced
from graphprune.report.trained import Trained
from graphprune.training import Training
from graphprune.training.core.options import Count, LossName, NotNegative, Positive, Share
from graphprune.training.domains.options import Domains
from graphprune.training.gated import SMALL
from graphprune.training.gates.places import places_of
from graphprune.training.grasp import Grasped, Grasping, grasp
from graphprune.training.mixed import check_domains, domains_of, figures_of, notes_of


@dataclass(frozen=True)
class Grasp:
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

    needs_data: ClassVar[bool] = True
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

    @cached_property
    def goal(self) -> Goal:
        """What it is to reach."""
        return Goal.of(
            "grasp", self.score, remove=self.remove, target=self.target, shape=self.shape,
            exclude=self.whole, minimum=self.minimum, uniform=self.uniform,
        )  # fmt: skip

    @property
    def amount(self) -> Amount:
        """How much data it takes."""
        return TRAINING

    @property
    def passes(self) -> int:
        """How often the data goes through a model; a gradient counts as two more."""
        return 3 + self.training.needs_teacher

    def check(self, state: State, context: Context) -> None:
        """See that the goal can be reached, and that gates have places.

        Raises:
            PlanError: they don't, something is cut before, or the model has no gradients.
        """
        program = self.goal.program(state)
        check_domains(self.domains)
        places_of(program, [one.structure for one in self.goal.gated(program, context.seed)])

    def run(self, state: State, context: Context) -> State:
        """Choose.

        Raises:
            GraphPruneError: see `graphprune.training.grasp.grasp`.
        """
        program = self.goal.program(state)
        samples = context.samples(TRAINING)
        training = replace(self.training, seed=self.seed or context.seed)
        training = training.settled(teacher=False, causal=program.is_causal)
        gated = self.goal.gated(program, context.seed, samples.data)
        dense = as_traced(context.dense, "grasp")
        size = self.goal.size(program, context.seed)
        data, dealt = domains_of(self.domains, samples, dense, size)
        with context.stage("choosing units by gates"):
            found = grasp(
                program,
                data,
                gated,
                training,
                Grasping(self.score_lr, self.scale_lr, self.scaling, self.every),
                solve=None if self.uniform else self.goal.solver(program, context.seed),
                masks=state.masks,
                teacher=dense if training.needs_teacher else None,
                callbacks=dealt,
                state=saving(context),
                progress=each_step(context.progress, "choosing units by gates"),
            )
        self.goal.check_budget(program, found.plan)
        details = _details(found, samples.described(), figures_of(dealt))
        record = Record("grasp", (*_notes(found), *notes_of(dealt)), details)
        return replace(state, program=found.program, plan=found.plan, unfitted=None).recorded(
            record
        )

    def preview(self, state: State, context: Context) -> State:
        """A plan of the sizes that the run's has, of units that are drawn."""
        plan = self.goal.plan(self.goal.program(state), context.seed)
        return replace(state, plan=plan).recorded(Record("grasp"))

    def describe(self, state: State) -> str:
        """One line."""
        return f"choose by gates which units of {len(state.plan.kept_units)} structures stay"


def _notes(found: Grasped) -> tuple[str, ...]:
    small = sum(found.small.values())
    if not small:
        return found.recovered.notes
    return (*found.recovered.notes, f"{small} units that stay have scales below {SMALL}")


def _details(found: Grasped, samples: str, more: Mapping[str, Any]) -> Trained:
    run = found.recovered
    tenth = max(1, run.steps // 10)
    first, last = (sum(part) / tenth for part in (run.losses[:tenth], run.losses[-tenth:]))
    told = (
        f"chose units by gates on {run.tokens:,} tokens in {run.steps:,} steps, which exchanged "
        f"{found.exchanged:,} of them: mean loss of the first tenth {first:.4f}, of the last "
        f"{last:.4f}"
    )
    figures = {
        "tokens": run.tokens,
        "steps": run.steps,
        "losses": list(run.losses),
        "exchanged": found.exchanged,
        "small": dict(found.small),
        **more,
    }
    return Trained("grasp", found.changed, told, figures, samples)
