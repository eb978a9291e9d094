"""The pass ``shear``: which units stay is learned by gates while the weights train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from graphprune.calibration.sources.amounts import TRAINING, Amount
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.gradual.goal import Goal
from graphprune.pipeline.steps.recover import each_step, saving
from graphprune.pipeline.steps.traced import as_traced
from graphprune.report.trained import Trained
from graphprune.training import Training
from graphprune.training.core.options import NotNegative, Share
from graphprune.training.domains.options import Domains
from graphprune.training.gated import SMALL
from graphprune.training.gates.places import places_of
from graphprune.training.learn import Learned, Learning, learn
from graphprune.training.mixed import check_domains, domains_of, figures_of, notes_of


@dataclass(frozen=True)
class Shear(Training):
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

    needs_data: ClassVar[bool] = True
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
    def goal(self) -> Goal:
        """What it is to reach."""
        return Goal.of(
            "shear", self.score, remove=self.remove, target=self.target, shape=self.shape,
            exclude=self.whole, minimum=self.minimum, uniform=self.uniform,
        )  # fmt: skip

    @property
    def amount(self) -> Amount:
        """How much data it takes."""
        return TRAINING

    @property
    def passes(self) -> int:
        """How often the data goes through a model; a gradient counts as two more."""
        return 3 + self.needs_teacher

    def check(self, state: State, context: Context) -> None:
        """See that the goal can be reached, and that gates have places.

        Raises:
            PlanError: they don't, something is cut before, or the model has no gradients.
        """
        program = self.goal.program(state)
        check_domains(self.domains)
        places_of(program, [one.structure for one in self.goal.gated(program, context.seed)])

    def run(self, state: State, context: Context) -> State:
        """Train, and choose.

        Raises:
            GraphPruneError: see `graphprune.training.learn.learn`.
        """
        program = self.goal.program(state)
        samples = context.samples(TRAINING)
        options = {f.name: getattr(self, f.name) for f in fields(Training)}
        options["seed"] = self.seed or context.seed
        training = Training(**options).settled(teacher=False, causal=program.is_causal)
        gated = self.goal.gated(program, context.seed, samples.data)
        dense = as_traced(context.dense, "shear")
        size = self.goal.size(program, context.seed)
        data, dealt = domains_of(self.domains, samples, dense, size)
        with context.stage("learning which units stay"):
            found = learn(
                program,
                data,
                gated,
                training,
                Learning(
                    self.gate_lr, self.multiplier_lr, self.target_warmup,
                    self.score is not None, self.snap,
                ),
                solve=None
                if self.uniform
                else self.goal.solver(program, context.seed, together=True),
                budget=self.goal.budget(program),
                masks=state.masks,
                teacher=dense if training.needs_teacher else None,
                callbacks=dealt,
                state=saving(context),
                progress=each_step(context.progress, "learning which units stay"),
            )  # fmt: skip
        self.goal.check_budget(program, found.plan)
        details = _details(found, samples.described(), figures_of(dealt))
        record = Record("shear", (*_notes(found), *notes_of(dealt)), details)
        return replace(state, program=found.program, plan=found.plan, unfitted=None).recorded(
            record
        )

    def preview(self, state: State, context: Context) -> State:
        """A plan of the sizes that the run's has, of units that are drawn."""
        plan = self.goal.plan(self.goal.program(state), context.seed)
        return replace(state, plan=plan).recorded(Record("shear"))

    def describe(self, state: State) -> str:
        """One line."""
        return f"learn by gates which units of {len(state.plan.kept_units)} structures stay"


def _notes(found: Learned) -> tuple[str, ...]:
    small = sum(found.small.values())
    if not small:
        return found.recovered.notes
    note = (
        f"{small} units that stay have gates below {SMALL}: they do little, and training what is "
        "left (recover) may give them more"
    )
    return (*found.recovered.notes, note)


def _details(found: Learned, samples: str, more: Mapping[str, Any]) -> Trained:
    run = found.recovered
    tenth = max(1, run.steps // 10)
    first, last = (sum(part) / tenth for part in (run.losses[:tenth], run.losses[-tenth:]))
    told = (
        f"learned by gates which units stay on {run.tokens:,} tokens in {run.steps:,} steps: mean "
        f"loss of the first tenth {first:.4f}, of the last {last:.4f}"
    )
    figures = {
        "tokens": run.tokens,
        "steps": run.steps,
        "losses": list(run.losses),
        "expected": dict(found.expected),
        "small": dict(found.small),
        **more,
    }
    return Trained("shear", found.changed, told, figures, samples)
