"""A sweep from a source to files: trace once, make every point, measure them together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from graphprune.emit.formats import shown
from graphprune.emit.places import check_apart, mapped_by, mapped_from, place_of, read_by
from graphprune.errors import EmitError
from graphprune.files import claimed
from graphprune.files.sources import reading
from graphprune.pipeline.checking import check_weights
from graphprune.pipeline.opening import open_source
from graphprune.pipeline.resume import facts_of
from graphprune.pipeline.run import Run
from graphprune.plan.selector import named
from graphprune.preflight.checks import check_request
from graphprune.preflight.readers import calibrates, without_data
from graphprune.quality.conditions import parse_all
from graphprune.recipe.recipe import Recipe
from graphprune.report.provenance import command
from graphprune.sweep.axes import Setting
from graphprune.sweep.ledger import Ledger
from graphprune.sweep.making import Made, make, prepare
from graphprune.sweep.measuring import measure
from graphprune.sweep.result import Cell, Point, Sweep
from graphprune.sweep.sensitivity import sensitivity
from graphprune.sweep.sharing import share
from graphprune.sweep.suggest import suggest
from graphprune.sweep.writing import RESULT, write


def sweep(
    source: str | Path,
    settings: Sequence[Setting],
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    flags: Mapping[str, object] | None = None,
    by_layer: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    weights: str | Path | None = None,
    trust: bool = False,
    allow_unused_weights: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Sweep:
    """Make and measure a model at several sizes, or by several methods, and suggest one of them.

    The model is traced once, data is read once, and the dense model is measured once. Points whose
    units score obs chooses are made together, on statistics of the dense model; scores look at it
    once. Whatever else a recipe asks for is done for each point.

    Args:
        source: a checkpoint, hub id, ``.pt2`` or ``.onnx`` file, or ``module:factory``.
        settings: the points; see `graphprune.sweep.axes.settings`.
        output: a directory.
        recipe: what all points have in common: a YAML file, or the name of a shipped one.
        flags: likewise, on top of it; see `graphprune.recipe.flags.with_flags`.
        by_layer: also cut each structure alone, as much as the smallest point does.
        overwrite: replace an output that is a sweep, and drop what an interrupted one has left.
        resume: go on from where an interrupted sweep of the same stopped.
        weights: a safetensors file with the state dict of a factory's module.
        trust: whether a checkpoint or a ``.pt2`` file may run code of its own.
        allow_unused_weights: see `graphprune.load`.
        progress: called with the name of each stage as it begins.

    Raises:
        GraphPruneError: something that the caller can put right; nothing has been written then.
    """
    recipes = [Recipe.from_flags(recipe, _joined(flags or {}, one.flags)) for one in settings]
    if any(map(calibrates, recipes)):
        recipes = [one if calibrates(one) else without_data(one) for one in recipes]
    tell = progress or (lambda stage: None)
    for one in recipes:
        check_request(source, one, None, recipe, None, weights, dry_run=True, trust=trust,
                      progress=tell)  # fmt: skip
    place = place_of(Path(output), single=False)
    check_apart(Path(output), [place], read_by(source, recipe, recipes[0], weights))
    _check_free(place, overwrite=overwrite)
    opening = {"trust": trust, "allow_unused_weights": allow_unused_weights}
    with (
        claimed(place, overwrite=overwrite) as claim,
        reading(mapped_from(source, weights)) as sources,
    ):
        _check_free(place, overwrite=overwrite)
        tell = sources.checking(tell)
        tell("loading and tracing")
        start = time.perf_counter()
        dense = named(open_source(source, None, weights, opening), recipes[0].own_names)
        sources.add(mapped_by(dense))
        seconds = {"loading and tracing": round(time.perf_counter() - start, 3)}
        tell("checking weights")
        check_weights(dense)
        facts = {
            "settings": [
                [one.label, facts_of(own, source)]
                for one, own in zip(settings, recipes, strict=True)
            ],
            "by_layer": by_layer,
        }
        ledger = Ledger.open(place, facts, resume=resume, overwrite=overwrite)
        with ledger.kept():
            runs = prepare(dense, recipes, source, weights, opening, tell, seconds)
            found = _run(source, settings, runs, ledger, tell, by_layer=by_layer)
            with claim.writing() as folder:
                folder.mkdir()
                write(folder, found)
                tell("putting the files in place")
    return found


def _run(
    source: str | Path,
    settings: Sequence[Setting],
    runs: Sequence[Run],
    ledger: Ledger,
    tell: Callable[[str], None],
    *,
    by_layer: bool,
) -> Sweep:
    """Make all points, measure them, and choose one."""
    shared = share(runs, ledger, tell)
    made: list[Made] = []
    for number, (setting, run) in enumerate(zip(settings, runs, strict=True)):
        tell(f"point {number + 1} of {len(runs)}: {setting.label}")
        made.append(make(number, setting, run, shared, ledger, source))
    first = next((run for run in runs if calibrates(run.recipe)), runs[0])
    with first.stage("measuring"):
        read = measure(
            first.dense, made, first.recipe.calibration, first.seed, ledger, first.progress
        )
    cells: tuple[Cell, ...] = ()
    if by_layer:
        smallest = min(made, key=lambda one: one.point.after.parameters or 0)
        with first.stage("cutting structures one by one"):
            cells = sensitivity(first, smallest.state.plan, first.progress)
    return Sweep(
        source=shown(source),
        before=read.before,
        points=read.points,
        suggestion=suggest(read.points, read.before, parse_all(first.recipe.fail_if)),
        sensitivity=cells,
        notes=(*_notes(read.points), *read.notes),
        seconds=first.seconds,
        command=command(),
    )


def _notes(points: Sequence[Point]) -> tuple[str, ...]:
    """What to say of how points were made."""
    if not any(one.shared for one in points):
        return ()
    return (
        "units were chosen and layers refitted on statistics of the dense model, which all points "
        "share; compile sees each layer in the model as pruned so far, and comes out a little "
        "better as a rule",
    )


def _joined(flags: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """The flags of all points with those of one on top; masks key by key."""
    masks = {**_section(flags), **_section(own)}
    return {**flags, **own, **({"sparsify": masks} if masks else {})}


def _section(flags: Mapping[str, object]) -> dict[str, object]:
    found = flags.get("sparsify")
    return dict(found) if isinstance(found, Mapping) else {}


def _check_free(place: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a sweep that may be replaced.

    Raises:
        EmitError: it is.
    """
    if place.is_file():
        raise EmitError("the output is a file", where=str(place), hint="give a directory")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not overwrite:
        raise EmitError(
            "the output exists", where=str(place), hint="choose another, or allow overwriting it"
        )
    if not (place / RESULT).is_file():
        raise EmitError(
            "the output is a directory that no sweep has written",
            where=str(place),
            why=f"it has no {RESULT}",
            hint="choose another, or remove it yourself",
        )
