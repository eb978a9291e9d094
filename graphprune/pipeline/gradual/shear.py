"""The pass ``shear``: which units stay is learned by gates while the weights train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from graphprune.analysis.structure import Structure
from graphprune.calibration.sources.amounts import TRAINING, Amount
from graphprune.errors import PlanError, RecipeError
from graphprune.ir.torch.program import Program
from graphprune.passes.protocol import Context, Record, State
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.budget import RESOURCES, parse_target
from graphprune.passes.selection.scope import Scope
from graphprune.passes.selection.select import select
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Inputs
from graphprune.pipeline.steps.recover import each_step, saving
from graphprune.pipeline.steps.traced import as_traced
from graphprune.plan.kept import rows_of
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.report.trained import Trained
from graphprune.training import Training
from graphprune.training.core.options import NotNegative, Share
from graphprune.training.gates.gates import Gated
from graphprune.training.gates.places import places_of
from graphprune.training.learn import SMALL, Learned, Learning, learn


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
        score: begin with gates in the order of this score rather than all open.
        gate_lr: the highest learning rate of gates, which rises and falls as that of weights.
        multiplier_lr: that of the multipliers that hold gates to the target.
        target_warmup: share of the steps in which the target rises from nothing.
        snap: units that stay are as they were, rather than scaled by their gates.
    """

    needs_data: ClassVar[bool] = True
    remove: Mapping[str, float] | None = None
    target: Mapping[str, int | float] | None = None
    shape: Mapping[str, int] | None = None
    whole: tuple[str, ...] = ()
    minimum: int | float = 1
    score: str | None = None
    gate_lr: NotNegative = 1.0
    multiplier_lr: NotNegative = 1.0
    target_warmup: Share = 0.2
    snap: bool = False

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RecipeError: one is of another type or out of its range, or there is not one goal.
        """
        super().__post_init__()
        if len(self._goal) != 1:
            raise RecipeError(
                "shear has exactly one of remove, target, shape",
                why=f"this one has {' and '.join(self._goal) or 'none'}",
            )

    @property
    def _goal(self) -> dict[str, Any]:
        goals = {"remove": self.remove, "target": self.target, "shape": self.shape}
        return {name: goal for name, goal in goals.items() if goal is not None}

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
        program = self._program(state)
        places_of(program, [one.structure for one in self._gated(program, context)])

    def run(self, state: State, context: Context) -> State:
        """Train, and choose.

        Raises:
            GraphPruneError: see `graphprune.training.learn.learn`.
        """
        program = self._program(state)
        samples = context.samples(TRAINING)
        options = {f.name: getattr(self, f.name) for f in fields(Training)}
        options["seed"] = self.seed or context.seed
        training = Training(**options).settled(teacher=False, causal=program.is_causal)
        gated = self._gated(program, context, samples.data)
        with context.stage("learning which units stay"):
            found = learn(
                program,
                samples.data,
                gated,
                training,
                Learning(
                    self.gate_lr, self.multiplier_lr, self.target_warmup,
                    self.score is not None, self.snap,
                ),
                masks=state.masks,
                teacher=as_traced(context.dense, "shear") if training.needs_teacher else None,
                state=saving(context),
                progress=each_step(context.progress, "learning which units stay"),
            )  # fmt: skip
        self._check_budget(program, found.plan)
        record = Record("shear", _notes(found), _details(found, samples.described()))
        return replace(state, program=found.program, plan=found.plan, unfitted=None).recorded(
            record
        )

    def preview(self, state: State, context: Context) -> State:
        """A plan of the sizes that the run's has, of units that are drawn."""
        plan = self._sizes(self._program(state), context)
        return replace(state, plan=plan).recorded(Record("shear"))

    def describe(self, state: State) -> str:
        """One line."""
        return f"learn by gates which units of {len(state.plan.kept_units)} structures stay"

    def _program(self, state: State) -> Program:
        if state.plan.kept_units:
            raise PlanError(
                "shear begins with the whole model",
                why="an earlier step removes units",
                hint="put it first, or give it all that is to go",
            )
        return as_traced(state.program, "shear")

    def _sizes(self, program: Program, context: Context) -> Plan:
        """A plan with as many units as are to stay."""
        return select(
            program, **self._goal, score=Random(), exclude=self.whole, minimum=self.minimum,
            seed=context.seed, notes=[],
        )  # fmt: skip

    def _gated(self, program: Program, context: Context, data: Any = None) -> list[Gated]:
        """The structures that are to lose units; with scores where there is data."""
        plan = self._sizes(program, context)
        scope = Scope(program, self.whole, (), self.minimum)
        structures = [program.by_name[name] for name in plan.kept_units]
        scores = {} if data is None else self._scores(program, structures, context, data)
        return [
            Gated(
                s,
                1 if s.within is None else s.within.size,
                len(rows_of(plan.kept_units[s.name])[0]),
                scope.candidate(s).removable,
                scores.get(s.name),
            )
            for s in structures
        ]

    def _scores(
        self, program: Program, structures: list[Structure], context: Context, data: Any
    ) -> dict[str, FloatArray]:
        """The scores of all units that can be judged, ``[rows, size]``."""
        if self.score is None:
            return {}
        score = get_score(self.score)
        unknown = unjudged(score, program)
        judged = [s for s in structures if s.name not in unknown]
        found = score.score(program, judged, Inputs(data, None, context.seed))
        return {s.name: found[s.name].sum(axis=0).reshape(-1, s.size) for s in judged}

    def _check_budget(self, program: Program, plan: Plan) -> None:
        """See that a budget is kept, whichever layers have gone."""
        if self.target is None:
            return
        resource, budget = parse_target(self.target, program.costs.total())
        selection = plan.bind(program)
        blocks = [b for own in selection.cuts.values() for b in own]
        cost = RESOURCES[resource](program.costs.of(selection.keep, blocks))
        if cost > budget:
            raise PlanError(
                f"the units that stay have {cost:,} {resource}, and the budget is {budget:,}",
                why="layers of different sizes are to go, and the smaller ones went",
                hint="give shape, or remove, in place of target",
            )


def _notes(found: Learned) -> tuple[str, ...]:
    small = sum(found.small.values())
    if not small:
        return found.recovered.notes
    note = (
        f"{small} units that stay have gates below {SMALL}: they do little, and training what is "
        "left (recover) may give them more"
    )
    return (*found.recovered.notes, note)


def _details(found: Learned, samples: str) -> Trained:
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
    }
    return Trained("shear", tuple(run.weights), told, figures, samples)
