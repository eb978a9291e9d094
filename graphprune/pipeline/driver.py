"""The driver: runs the passes of a recipe one after the other, and saves what each has done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from graphprune.errors import CalibrationError, RecipeError
from graphprune.passes.protocol import Pass, State
from graphprune.pipeline.choices import without_fallback, without_surgery
from graphprune.pipeline.run import Run
from graphprune.pipeline.sharing import has_done, load, save, settled_alike
from graphprune.recipe.steps import PASSES, REMOVING, Planned

_CHOOSING = ("select", "replay")
"""Passes that remove structures and leave all weights as they are."""


@dataclass(frozen=True)
class Placed:
    """A pass in its place.

    Attributes:
        planned: as the recipe has it.
        step: what runs.
        label: what it is called in the journal: "2-repair".
        ahead: the names of those after it.
    """

    planned: Planned
    step: Pass
    label: str
    ahead: tuple[str, ...]

    def enter(self, run: Run) -> None:
        """Make it the present pass of a run."""
        run.round, run.label, run.ahead = self.planned.round, self.label, self.ahead


def build_passes(planned: Sequence[Planned], within: str = "") -> tuple[Placed, ...]:
    """Build passes, in order.

    Args:
        planned: those of a recipe.
        within: what their labels begin with.

    Raises:
        PlanError: a pass of another package can't be loaded.
    """
    return tuple(
        Placed(one, _built(one), f"{within}{n}-{one.name}", tuple(p.name for p in planned[n:]))
        for n, one in enumerate(planned, 1)
    )


def _built(one: Planned) -> Pass:
    if not isinstance(one.options, Mapping):
        return PASSES.find(one.name)(one.options)  # type: ignore[call-arg]
    return PASSES.build(one.name, one.options)


def check_passes(passes: Sequence[Placed], state: State, run: Run) -> None:
    """Have every pass refuse what can't work, before data is read."""
    for one in passes:
        one.enter(run)
        one.step.check(state, run)


def run_passes(run: Run, state: State, planned: Callable[[State], None]) -> State:
    """Run the passes of a run's recipe.

    Where the score and the repair were left to us, and the dense model makes no sense of the data,
    units are ranked by gradients instead.

    Args:
        run: the run.
        state: what they begin with.
        planned: called once sizes are settled, before what takes long.

    Raises:
        GraphPruneError: a pass fails.
    """
    try:
        return _run(run, state, planned)
    except CalibrationError as error:
        fall_back(run, error)
        return _run(run, state, planned)


def fall_back(run: Run, error: CalibrationError) -> None:
    """Have a run rank units by gradients, since the dense model makes no sense of the data.

    Raises:
        CalibrationError: it is about something else, or the score, the repair or the data was
            given.
    """
    if error is not run.unfit or not {"score", "repair"} <= run.open:
        raise error
    if run.given:
        raise without_fallback(error) from error
    run.recipe, note = without_surgery(run.recipe, run.open, error)
    run.note(note)


def _run(run: Run, state: State, planned: Callable[[State], None]) -> State:
    passes = build_passes(run.recipe.passes)
    settled = max((n for n, one in enumerate(passes) if one.planned.name in REMOVING), default=-1)
    if not run.dry:
        _read(passes, run)
    told = None
    for number, one in enumerate(passes):
        if number == settled + 1:  # what comes now takes long, and rarely changes sizes
            planned(state)
            told = state.plan
        one.enter(run)
        state = _saved(one, run, state) if not run.dry else one.step.preview(state, run)
    if state.plan != told:
        planned(state)
    return state


def _read(passes: Sequence[Placed], run: Run) -> None:
    """Read all data before anything is computed with it, so that what is wrong is told at once."""
    for one in passes:
        amount: Any = getattr(one.step, "amount", None)
        done = has_done(run.saved, one.label)
        if amount is not None and not done:
            one.enter(run)
            run.samples(amount)


def run_planned(run: Run, planned: Sequence[Planned], within: str) -> State:
    """Run other passes than those of the run's recipe, from its dense model on.

    Args:
        run: the run.
        planned: the passes.
        within: what they are called in the journal begins with it.

    Raises:
        GraphPruneError: a pass fails.
    """
    return run_built(run, build_passes(planned, within))


def run_built(run: Run, passes: Sequence[Placed]) -> State:
    """Run passes that are built, from the dense model of a run on.

    Raises:
        GraphPruneError: a pass fails.
    """
    _read(passes, run)
    state = State.of(run.dense)
    for one in passes:
        one.enter(run)
        state = _saved(one, run, state)
    return state


def plan_alone(run: Run, state: State) -> State:
    """Choose units as the passes do, and leave all weights as they are.

    Raises:
        RecipeError: a pass chooses them by training.
    """
    for one in build_passes(run.recipe.passes):
        name = one.planned.name
        if name in REMOVING and name not in _CHOOSING:
            raise RecipeError(
                f"{name} chooses units while the weights train, and leaves no plan without them",
                where="steps",
                hint="use graphprune.compile, which writes the plan and the weights",
            )
        if name in _CHOOSING:
            one.enter(run)
            state = cast("Any", one.step).choose(state, run)
    return state


def described(run: Run, state: State) -> tuple[str, ...]:
    """A line on each pass; those of several rounds once."""
    lines = []
    for one in build_passes(run.recipe.passes):
        turn, line = one.planned.round, one.step.describe(state)
        if line and turn.number == 1:
            lines.append(f"{line} in {turn.of} rounds" if turn.of > 1 else line)
    return tuple(lines)


def _saved(one: Placed, run: Run, state: State) -> State:
    """Run a pass, or take up what it did before an interruption; then save what it did.

    A plan is saved here. Passes that change weights have saved these themselves, as they went, and
    take them up from there.
    """
    before = load(run.saved, one.label, state)
    if before is not None:
        return before
    found = settled_alike(state, one.step.run(state, run))
    same = found.program is state.program and found.masks is state.masks
    if same and found.records[-1].details is None:
        save(run.saved, one.label, found)
    return found
