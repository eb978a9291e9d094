"""Controls: what a trained model is compared with, from the same recipe and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.ir.torch.program import Program, is_traced
from graphprune.passes.turn import Round
from graphprune.pipeline.driver import run_planned
from graphprune.pipeline.run import Run
from graphprune.quality.attempts import attempted
from graphprune.quality.perplexity import perplexity
from graphprune.recipe.steps import PASSES, Planned
from graphprune.report.control import Control
from graphprune.report.report import Report
from graphprune.rewrite.apply import apply
from graphprune.rewrite.slim import Slim


@dataclass(frozen=True)
class Arm:
    """A control.

    Attributes:
        name: what is done otherwise.
        passes: what is done to the dense model.
    """

    name: str
    passes: tuple[Planned, ...]


def arms_of(passes: Sequence[Planned]) -> tuple[Arm, ...]:
    """The controls of a recipe's passes, which train something.

    The dense model that learns from itself stays as it is, so that it is trained only where its
    labels, or another teacher, teach it anything.
    """
    trainings = [one for one in passes if one.name == "recover"]
    others = tuple(one for one in passes if one.name != "recover")
    arms = []
    if others:
        arms.append(Arm("not trained", others))
    if any(one.round.of > 1 for one in passes):
        arms.append(Arm("one cut, trained alike", _one_cut(passes)))
    if others and any(_learns_alone(one.options) for one in trainings):
        arms.append(Arm("the dense model, trained alike", (_together(trainings),)))
    return tuple(arms)


def with_controls(run: Run, report: Report) -> Report:
    """Make and measure the controls that a recipe asks for.

    Args:
        run: the run.
        report: of a result that has been measured.
    """
    if not run.recipe.control:
        return report
    program = run.dense
    if not report.before.perplexities or not is_traced(program):
        note = "no controls: they are compared by perplexity, and none was measured"
        return replace(report, notes=(*report.notes, note))
    notes: list[str] = []
    found: list[Control] = []
    with run.stage("controls"):
        for number, arm in enumerate(arms_of(run.recipe.passes), 1):
            run.progress(f"control: {arm.name}")
            with attempted(f"control, {arm.name},", notes):
                alone = replace(run, seconds={}, notes=())
                state = run_planned(alone, arm.passes, f"control-{number}-")
                slim = cast("Slim", apply(state.program, state.plan))
                found.append(Control(arm.name, _perplexities(run, program, slim.module)))
    return replace(report, controls=tuple(found), notes=(*report.notes, *notes))


def _perplexities(run: Run, program: Program, module: Callable[..., Any]) -> Mapping[str, float]:
    wanted = run.recipe.calibration
    found = {}
    for text in measured_texts(program, wanted):
        windows = evaluation_windows(program, wanted, run.seed, text)
        found[text.source] = perplexity(module, windows).value
    return found


def _one_cut(passes: Sequence[Planned]) -> tuple[Planned, ...]:
    """The last turn alone, with the training of all."""
    found = []
    for one in passes:
        if one.round.of == 1:
            found.append(one)
        elif one.round.number == one.round.of:
            turns = [p for p in passes if p.name == "recover" and p.round.of > 1]
            whole = _together(turns) if one.name == "recover" else replace(one, round=Round())
            found.append(whole)
    return tuple(found)


def _together(trainings: Sequence[Planned]) -> Planned:
    """Several trainings as one, with the budgets of all."""
    last = trainings[-1]
    whole = {"tokens": 0.0, "steps": 0.0, "epochs": 0.0}
    for one in trainings:
        begin, end = one.round.part
        built: Any = PASSES.build(one.name, one.options)
        found = {name: getattr(built, name) for name in whole}
        if not any(found.values()):
            found["epochs"] = 1.0
        for name, value in found.items():
            whole[name] += (end - begin) * (value or 0)
    budget = {name: value for name, value in whole.items() if value}
    budget |= {name: round(budget[name]) for name in ("tokens", "steps") if name in budget}
    return replace(last, options={**last.options, **budget}, round=Round())


def _learns_alone(options: Mapping[str, Any]) -> bool:
    """Whether a training teaches the dense model anything."""
    return options.get("loss") in ("ce", "kd+ce") or options.get("teacher") is not None
