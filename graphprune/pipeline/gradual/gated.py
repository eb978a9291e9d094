"""What the passes have in common that choose units by gates: a goal, domains, and the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from graphprune.calibration.sources.amounts import TRAINING, Amount
from graphprune.ir.torch.program import Program
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.gradual.goal import Goal
from graphprune.pipeline.steps.recover import each_step, saving
from graphprune.pipeline.steps.traced import as_traced
from graphprune.report.trained import Trained
from graphprune.training import Training
from graphprune.training.domains.options import Domains
from graphprune.training.gated import Chosen, Given, Solve
from graphprune.training.gates.gates import Gated
from graphprune.training.gates.places import places_of
from graphprune.training.mixed import check_domains, domains_of, figures_of, notes_of

Found = TypeVar("Found", bound=Chosen)


class ByGates(Generic[Found]):
    """A pass that chooses units by gates; its options are fields of the class that has it.

    Attributes:
        name: of the pass.
        stage: what it does, as progress has it.
        doing: what it has done, as the report has it.
        together: whether the ways to an uneven goal are solved for all structures at once.
    """

    needs_data: ClassVar[bool] = True
    name: ClassVar[str]
    stage: ClassVar[str]
    doing: ClassVar[str]
    together: ClassVar[bool] = False

    remove: Mapping[str, Any] | None
    target: Mapping[str, Any] | None
    shape: Mapping[str, Any] | None
    whole: tuple[str, ...]
    minimum: Any
    uniform: bool
    score: str | None
    domains: Domains | None
    seed: int

    @property
    @abstractmethod
    def training(self) -> Training:
        """How it trains."""

    @abstractmethod
    def choose(
        self,
        program: Program,
        data: Any,
        gated: Sequence[Gated],
        training: Training,
        solve: Solve | None,
        given: Given,
    ) -> Found:
        """Train gates, and choose; see `graphprune.training.gated.train_gated`."""

    @abstractmethod
    def told(self, found: Found) -> tuple[tuple[str, ...], str, Mapping[str, Any]]:
        """Notes of its own; what happened in the steps; and figures."""

    @cached_property
    def goal(self) -> Goal:
        """What it is to reach."""
        return Goal.of(
            self.name, self.score, remove=self.remove, target=self.target, shape=self.shape,
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
        """Train, and choose.

        Raises:
            GraphPruneError: see `choose`.
        """
        program, goal = self.goal.program(state), self.goal
        samples = context.samples(TRAINING)
        training = replace(self.training, seed=self.seed or context.seed)
        training = training.settled(teacher=False, causal=program.is_causal)
        gated = goal.gated(program, context.seed, samples.data)
        dense = as_traced(context.dense, self.name)
        size = goal.size(program, context.seed)
        data, dealt = domains_of(self.domains, samples, dense, size)
        solve = None
        if not self.uniform:
            solve = goal.solver(program, context.seed, together=self.together)
        given: Given = {
            "masks": state.masks,
            "teacher": dense if training.needs_teacher else None,
            "callbacks": dealt,
            "state": saving(context),
            "progress": each_step(context.progress, self.stage),
        }
        with context.stage(self.stage):
            found = self.choose(program, data, gated, training, solve, given)
        goal.check_budget(program, found.plan)
        notes, meanwhile, figures = self.told(found)
        trained = Trained.of(
            self.name,
            found.changed,
            found.recovered,
            samples.described(),
            doing=self.doing,
            meanwhile=meanwhile,
            figures={**figures, "small": dict(found.small), **figures_of(dealt)},
        )
        record = Record(self.name, (*found.recovered.notes, *notes, *notes_of(dealt)), trained)
        state = replace(state, program=found.program, plan=found.plan, unfitted=None)
        return state.recorded(record)

    def preview(self, state: State, context: Context) -> State:
        """A plan of the sizes that the run's has, of units that are drawn."""
        plan = self.goal.plan(self.goal.program(state), context.seed)
        return replace(state, plan=plan).recorded(Record(self.name))
