"""The pass ``loraprune``: adapters train, and tell by their gradients which units go meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from graphprune.calibration.sources.amounts import TRAINING, Amount
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.loraprune import LoRAPruned, Pruning, check, loraprune
from graphprune.passes.loraprune.options import Estimate
from graphprune.passes.protocol import Context, Record, State
from graphprune.pipeline.gradual.goal import parse_goal
from graphprune.pipeline.steps.recover import each_step, saving
from graphprune.pipeline.steps.traced import as_traced
from graphprune.recipe.selection import Selection
from graphprune.report.trained import Trained
from graphprune.training import Training

_GOAL = ("remove", "target", "shape", "uniform", "align", "minimum", "normalize", "exclude",
         "include")  # fmt: skip


@dataclass(frozen=True)
class LoRAPrune(Training):
    """Train adapters, and remove units by the adapters' gradients a few at a time (LoRAPrune).

    One goal is given, as in ``select``; the other options of that which are taken are uniform,
    align, minimum, normalize, exclude and include, all about structures. The rest are those of
    `graphprune.training.Training` and `graphprune.passes.loraprune.Pruning`.

    Attributes:
        train: adapters are what trains.
        remove: fraction of the units of a role to remove.
        target: budget for the slim model.
        shape: exact sizes of the slim model by role.
        uniform: whether every layer loses as much.
        align: kept sizes are multiples of this.
        minimum: units left in a structure, or the fraction of it.
        normalize: how scores are made comparable between structures.
        adapters: globs of the weights that get an adapter; None for those of all layers.
        gradient: by what the gradient of a weight is told: that of its "adapters", or its own, of
            the "weight".
        average: share of the old scores in those after a step.
        initial: share of the steps before anything goes.
        rest: share of the steps that train what is left in the end.
        every: steps between two prunings; None for 10, or fewer where there would not be 8 of them.
    """

    needs_data: ClassVar[bool] = True
    train: Literal["lora"] = "lora"
    remove: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    shape: Mapping[str, Any] | None = None
    exclude: Any = ()
    include: Any = None
    uniform: bool = True
    align: Any = 1
    minimum: Any = 1
    normalize: str = "mean"
    adapters: tuple[str, ...] | None = None
    gradient: Estimate = "adapters"
    average: float = 0.9
    initial: float = 0.1
    rest: float = 0.1
    every: int | None = None

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RecipeError: one is of another type or out of its range, or two contradict each other.
        """
        self.training, self.pruning  # noqa: B018  (their own checks)

    @cached_property
    def training(self) -> Training:
        """How it trains."""
        options = {f.name: getattr(self, f.name) for f in fields(Training)}
        loss = "ce" if self.loss is None else self.loss
        return Training(**{**options, "loss": loss, "include": self.adapters, "exclude": ()})

    @cached_property
    def pruning(self) -> Pruning:
        """What goes, and when."""
        wanted = self._selection
        return Pruning(
            {name: goal for name, goal in wanted.goals.items() if goal is not None},
            exclude=wanted.exclude,
            include=wanted.include,
            uniform=wanted.uniform,
            align=1 if wanted.shape is not None else wanted.align,
            minimum=wanted.minimum,
            normalize=wanted.normalize,
            gradient=self.gradient,
            average=self.average,
            initial=self.initial,
            final=self.rest,
            every=self.every,
        )

    @cached_property
    def _selection(self) -> Selection:
        """The goal, checked as that of ``select``."""
        given = {name: getattr(self, name) for name in _GOAL}
        plain = {f.name: f.default for f in fields(self)}
        changed = {n: v for n, v in given.items() if v is not None and v != plain[n]}
        return parse_goal("loraprune", changed)

    @property
    def amount(self) -> Amount:
        """How much data it takes."""
        return TRAINING

    @property
    def passes(self) -> int:
        """How often the data goes through a model; a gradient counts as two more."""
        return 3 + (self.training.loss != "ce")

    def check(self, state: State, context: Context) -> None:
        """See that the goal can be reached.

        Raises:
            PlanError: it can't, the model is an ONNX graph, or structures have gone already.
        """
        self._trial(state, context)

    def run(self, state: State, context: Context) -> State:
        """Train, and remove units meanwhile.

        Raises:
            GraphPruneError: see `graphprune.passes.loraprune.loraprune`.
        """
        program = _whole(state)
        samples = context.samples(TRAINING)
        training = replace(self.training, seed=self.seed or context.seed)
        teacher = as_traced(context.dense, "loraprune") if training.needs_teacher else None
        with context.stage("training and pruning"):
            found = loraprune(
                program,
                samples.data,
                self._pruning(context),
                training,
                masks=state.masks,
                teacher=teacher,
                state=saving(context),
                progress=each_step(context.progress, "training and pruning"),
            )
        record = Record("loraprune", found.notes, _details(found, samples.described()))
        state = replace(state, program=found.program, plan=found.plan, unfitted=None)
        return state.recorded(record)

    def preview(self, state: State, context: Context) -> State:
        """Choose as many units as the run will, at random."""
        return replace(state, plan=self._trial(state, context)).recorded(Record("loraprune"))

    def describe(self, state: State) -> str:
        """One line."""
        return "train adapters, and remove units by their gradients meanwhile"

    def _trial(self, state: State, context: Context) -> Any:
        return check(_whole(state), self._pruning(context), self.training)[0]

    def _pruning(self, context: Context) -> Pruning:
        return replace(self.pruning, seed=context.seed)


def _whole(state: State) -> Program:
    """The program, of which no structure has gone yet.

    Raises:
        PlanError: some have, or it is an ONNX graph.
    """
    program = as_traced(state.program, "loraprune")
    if state.plan.kept_units:
        raise PlanError(
            "loraprune chooses all units that go",
            why="a step before it has removed some",
            hint="put loraprune first, or in another recipe for the model that comes out",
        )
    return program


def _details(found: LoRAPruned, samples: str) -> Trained:
    trained, removed = found.trained, found.events[-1].removed
    events = [{"step": e.step, "share": e.share, "removed": e.removed} for e in found.events]
    return Trained.of(
        "loraprune",
        tuple(trained.weights),
        trained,
        samples,
        doing="trained adapters",
        meanwhile=f", while {removed:,} units went at {len(events)} of them",
        figures={"events": events},
    )
