"""What points have in common: scores, and surgery on statistics of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.calibration.sources.amounts import REPAIRS
from graphprune.errors import CalibrationError
from graphprune.passes.protocol import State
from graphprune.passes.repair.structured import Repaired
from graphprune.passes.repair.together import Size, can_share, obs_together
from graphprune.passes.scores import get_score
from graphprune.passes.shared.choice import Choice, Chooser
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Inputs, Score
from graphprune.pipeline.driver import Placed, build_passes, fall_back
from graphprune.pipeline.run import Run
from graphprune.pipeline.steps.select import Select
from graphprune.pipeline.steps.surgery import surgeon_of, with_scores
from graphprune.pipeline.steps.told import each_group
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.recipe.selection import Selection
from graphprune.streaming.identity import identity
from graphprune.sweep.ledger import Ledger


@dataclass(frozen=True)
class Remembered:
    """A score that looks at the dense model once, whatever the number of points.

    Attributes:
        score_: what is asked.
        known: structure to its scores.
    """

    score_: Score
    known: dict[str, FloatArray] = field(default_factory=dict)

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Structures that the score can't judge, to the reason."""
        return unjudged(self.score_, program)

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`."""
        new = [s for s in structures if s.name not in self.known]
        if new:
            self.known.update(self.score_.score(program, new, inputs))
        return {s.name: self.known[s.name] for s in structures}


@dataclass(frozen=True)
class RememberedChooser(Remembered):
    """A score that chooses sets, and is asked once for each.

    Attributes:
        chosen: structure and removable units to what it chose.
    """

    chosen: dict[tuple[str, bytes], Choice | None] = field(default_factory=dict)

    def choose(
        self, program: BaseProgram, structure: Structure, removable: IntArray, inputs: Inputs
    ) -> Choice | None:
        """What of a structure is to stay."""
        key = (structure.name, removable.tobytes())
        if key not in self.chosen:
            score = cast("Chooser", self.score_)
            self.chosen[key] = score.choose(program, structure, removable, inputs)
        return self.chosen[key]


@dataclass
class Shared:
    """What is made once for all points.

    Attributes:
        operated: by the number of a point, what surgery has found.
        scores: by what they depend on.
    """

    operated: dict[int, Repaired] = field(default_factory=dict)
    scores: dict[str, Remembered] = field(default_factory=dict)

    def passes(self, number: int, run: Run) -> tuple[Placed, ...]:
        """The passes of a point, the first of which takes what is there already."""
        first, *rest = build_passes(run.recipe.passes)
        if not isinstance(first.step, Select) or first.planned.round.of > 1:
            return (first, *rest)
        step: Select = first.step
        if number in self.operated:
            step = replace(step, operated=self.operated[number])
        elif not step.options.operates:
            step = replace(step, judge=self._score(run, step.options))
        return (replace(first, step=step), *rest)

    def _score(self, run: Run, options: Selection) -> Remembered:
        spec = options.score.model_dump()
        key = identity([spec, run.seed, data_key(run)])
        if key not in self.scores:
            score = get_score(spec)
            kind = RememberedChooser if isinstance(score, Chooser) else Remembered
            self.scores[key] = kind(score)
        return self.scores[key]


def data_key(run: Run) -> str:
    """What the samples of a run depend on."""
    return identity([run.recipe.calibration.model_dump(mode="json"), run.seed])


def settle_surgery(run: Run) -> None:
    """Read what surgery looks at; rank by gradients where the dense model makes no sense of it.

    Raises:
        CalibrationError: it makes none, and the score or the data was given.
    """
    if not run.recipe.operates:
        return
    try:
        run.samples(REPAIRS)
    except CalibrationError as error:
        fall_back(run, error)


def share(runs: Sequence[Run], ledger: Ledger, tell: Callable[[str], None]) -> Shared:
    """Make what points have in common.

    Args:
        runs: of each point, with nothing left open.
        ledger: where progress is saved.
        tell: told of each group of weights.

    Raises:
        GraphPruneError: see `graphprune.passes.repair.together.obs_together`.
    """
    shared = Shared()
    alike: dict[str, list[tuple[int, Size, Plan]]] = {}
    for number, run in enumerate(runs):
        found = _sized(run)
        if found is not None:
            step, size, plan = found
            key = identity([data_key(run), *surgeon_of(step.options)])
            alike.setdefault(key, []).append((number, size, plan))
    for index, points in enumerate(alike.values()):
        run = runs[points[0][0]]
        surgeon, damping = surgeon_of(_first(run).options)
        with run.stage("choosing units for all points"):
            found_all = obs_together(
                run.dense,
                run.samples(REPAIRS).data,
                [size for _, size, _ in points],
                surgeon=surgeon,
                damping=damping,
                folder=ledger.weights / str(index),
                progress=each_group(tell, "choosing units for all points"),
                state=ledger.shared(index),
            )
        for (number, size, plan), one in zip(points, found_all, strict=True):
            noted = with_scores(run.dense, one.plan, size, plan)
            shared.operated[number] = replace(one, plan=noted)
    return shared


def _sized(run: Run) -> tuple[Select, Size, Plan] | None:
    """What surgery has to leave in a point, if statistics of the dense model serve it."""
    placed = build_passes(run.recipe.passes)[0]
    step = placed.step
    if not isinstance(step, Select) or not step.options.operates:
        return None
    placed.enter(run)
    size, plan = step.size(State.of(run.dense), run)
    return (step, size, plan) if size.keep and can_share(run.dense, size) else None


def _first(run: Run) -> Any:
    return build_passes(run.recipe.passes)[0].step
