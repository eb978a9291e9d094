"""From settings to slim models: one program, one reading of data, a run for each point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphprune.analysis.program import BaseProgram
from graphprune.emit.formats import with_formats
from graphprune.measure.early import check_measurable, deep_cuts_ahead
from graphprune.passes.protocol import Record, State
from graphprune.pipeline.checking import little_proof
from graphprune.pipeline.choices import choose_methods, gives_data
from graphprune.pipeline.default_data import with_data
from graphprune.pipeline.driver import build_passes, check_passes, run_built
from graphprune.pipeline.run import Run
from graphprune.preflight.readers import check_read
from graphprune.progress import Note
from graphprune.provenance.making import Making
from graphprune.provenance.resolved import resolved
from graphprune.recipe.recipe import Recipe
from graphprune.report.figures import measures_of
from graphprune.report.kept import kept_units
from graphprune.report.masks import Masks, Refits
from graphprune.rewrite.apply import apply
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.sweep.axes import Setting
from graphprune.sweep.ledger import Ledger
from graphprune.sweep.result import Point
from graphprune.sweep.sharing import Shared, data_key, settle_surgery


@dataclass(frozen=True)
class Made:
    """A point whose model is made, and not measured yet.

    Attributes:
        point: what is known of it.
        state: what the passes have made.
        slim: the slim model.
    """

    point: Point
    state: State
    slim: Slim | SlimOnnx


def prepare(
    dense: BaseProgram,
    recipes: Sequence[Recipe],
    source: object,
    weights: str | Path | None,
    opening: Mapping[str, bool],
    tell: Callable[[str], None],
    seconds: dict[str, float],
) -> list[Run]:
    """A run for each recipe, with nothing left open; all of them share what they read.

    Args:
        dense: the program.
        recipes: of each point.
        source: the model, as it was given.
        weights: the file with the weights of a factory's module.
        opening: the arguments of `graphprune.load` that let something through.
        tell: told of each stage.
        seconds: gets the time that each stage takes, of all points together.

    Raises:
        GraphPruneError: a point can't be made, or the data can't be read.
    """
    for recipe in recipes:
        check_read(recipe, dense.is_causal)
        check_passes(build_passes(recipe.passes), State.of(dense), Run(dense, recipe, tell))
        check_measurable(dense, recipe)
        for note in deep_cuts_ahead(dense, recipe):
            tell(Note(note))
    runs: list[Run] = []
    pools: dict[str, Run] = {}
    for recipe in recipes:
        run = Run(dense, recipe, tell, Making(source, weights, opening), seconds=seconds)
        run.given = gives_data(recipe)
        found = choose_methods(recipe, dense, surgery=True)
        run.open, run.notes = found.open, found.notes
        run.recipe = with_data(found.recipe, dense)
        like = pools.setdefault(data_key(run), run)
        if like is not run:
            run = replace(run, _samples=like._samples)
        settle_surgery(run)
        runs.append(run)
    return runs


def make(
    number: int, setting: Setting, run: Run, shared: Shared, ledger: Ledger, source: object
) -> Made:
    """Make the model of a point, and compare it with the masked one.

    Args:
        number: of the point.
        setting: what it is.
        run: of it.
        shared: what is made already.
        ledger: where passes save what they do.
        source: the model, as it was given.

    Raises:
        GraphPruneError: a pass fails.
        VerifyError: the slim model doesn't equal the masked one.
    """
    run.saved = ledger.journal(number)
    state = run_built(run, shared.passes(number, run))
    with run.stage("cutting"):
        slim = apply(state.program, state.plan)
    certificate = run.prove(state.program, state.plan, slim)
    refits, masks = _last(state.records, Refits), _last(state.records, Masks)
    formats = with_formats(run.recipe, source, None).formats  # type: ignore[arg-type]
    point = Point(
        label=setting.label,
        size=setting.size,
        series=setting.series,
        after=measures_of(slim.program, slim.cost),
        kept=kept_units(slim),
        error=sum(e.error for e in refits.layers) / len(refits.layers) if refits else None,
        zeros=masks.sparsity_of_model if masks else None,
        max_abs_error=certificate.max_abs_error,
        shared=number in shared.operated,
        recipe=resolved(
            run.recipe, formats, run.making, state.plan, run.dense, "score" in run.open
        ),
        notes=(
            *run.notes,
            *(() if refits else little_proof(certificate)),
            *dict.fromkeys(note for record in state.records for note in record.notes),
        ),
    )
    return Made(point, state, slim)


def _last(records: Sequence[Record], kind: type) -> Any:
    found = [record.details for record in records if isinstance(record.details, kind)]
    return found[-1] if found else None
