"""The report of a compilation, as far as it is known before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphprune.emit.formats import shown
from graphprune.frontends.hf.fit import unused_note
from graphprune.measure.early import with_sizes
from graphprune.passes.protocol import Record, State
from graphprune.pipeline.run import Run
from graphprune.recipe.rules import changed
from graphprune.recipe.steps import Planned
from graphprune.report.figures import measures_of
from graphprune.report.goals import rounding_notes
from graphprune.report.kept import kept_structures, kept_units
from graphprune.report.masks import Masks, Refits
from graphprune.report.report import Report
from graphprune.report.trained import Trained
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


def first_report(run: Run, state: State, slim: Slim | SlimOnnx, source: object) -> Report:
    """Tell what the passes have done.

    Args:
        run: the run.
        state: what the passes have made.
        slim: the slim model, of which nothing has been cut.
        source: the model, as it was given.

    Raises:
        ConditionError: the slim model has a size that it must not have.
    """
    native, notes = run.form
    weights = run.making.weights
    found = (note for record in state.records for note in record.notes)
    scores = dict.fromkeys(s.score.name for s in run.recipe.selections)
    report = Report(
        source=shown(source),
        weights=None if weights is None else str(Path(weights).absolute()),
        before=measures_of(run.dense, run.dense.costs.total()),
        after=measures_of(slim.program, slim.cost),
        kept=kept_units(slim),
        structures=kept_structures(slim),
        score=", ".join(scores) or None,
        native=native,
        notes=(
            *unused_note(run.dense),
            *notes,
            *dict.fromkeys(
                (*run.notes, *rounding_notes(run.dense, run.recipe, state.plan), *found)
            ),
        ),
        seconds=run.seconds,
        masks=_last(state.records, Masks),
        refits=_last(state.records, Refits),
        trained=tuple(r.details for r in state.records if isinstance(r.details, Trained)),
        passes=tuple(map(_told, run.recipe.passes, state.records)),
    )
    return with_sizes(report, run.recipe, slim)


def _last(records: Sequence[Record], kind: type[Any]) -> Any:
    """What the last pass of a kind has found; None where there is none."""
    found = [record.details for record in records if isinstance(record.details, kind)]
    return found[-1] if found else None


def _told(planned: Planned, record: Record) -> dict[str, Any]:
    """A pass, as the report has it."""
    options = planned.options
    if not isinstance(options, Mapping):
        whole = options.model_dump(mode="json")
        whole = {"name": whole} if isinstance(whole, str) else whole
        options = {name: whole[name] for name in (*changed(options), *(options.model_extra or {}))}
    found: dict[str, Any] = {"name": record.name, "options": dict(options)}
    if planned.round.of > 1:
        found["round"] = [planned.round.number, planned.round.of]
    return found | ({"notes": list(record.notes)} if record.notes else {})
