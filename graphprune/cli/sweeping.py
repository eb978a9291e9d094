"""``graphprune sweep``: one model at several sizes, or by several methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.console import noted, telling, use_threads
from graphprune.cli.events import recorded
from graphprune.cli.options import (
    DataSource,
    Device,
    DeviceMemory,
    Events,
    Exclude,
    FailIf,
    Include,
    Json,
    Overwrite,
    Resume,
    Seed,
    Source,
    Text,
    Threads,
    Trust,
    Unused,
    Weights,
)
from graphprune.cli.shown import show


def sweep(
    source: Source,
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="What all points have in common: a recipe, or the name of a shipped one."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the table, curve and recipe.")
    ] = Path("sweep"),
    target: Annotated[
        list[str] | None,
        typer.Option(help="Budgets: params=0.9,0.8,0.7,0.6, which is the default."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="Fractions to remove: ffn=10%,20%,30%; keys with several move together."),
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Exact sizes: layers=30,28,26.")] = None,
    score: Annotated[
        str | None, typer.Option(help="Scores: obs,flap,taylor; a curve for each.")
    ] = None,
    repair: Annotated[
        str | None, typer.Option(help="Repairs: none,reconstruct; a curve for each.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast,usual; balanced and best train every point.")
    ] = None,
    sparsify: Annotated[
        str | None, typer.Option(metavar="METHODS", help="Mask methods: wanda,sparsegpt.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Fractions of the weights that become zero: 50%,60%.")
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option("--by-layer", help="Also cut every structure alone: what each layer costs."),
    ] = False,
    exclude: Exclude = None,
    include: Include = None,
    text: Text = None,
    data: DataSource = None,
    weights: Weights = None,
    unused: Unused = False,
    seed: Seed = None,
    device: Device = None,
    memory: DeviceMemory = None,
    threads: Threads = None,
    fail_if: FailIf = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    trust: Trust = False,
    events: Events = None,
    as_json: Json = False,
) -> None:
    """Prune a model at several sizes or by several methods, and suggest which to take.

    Nothing but a table (CSV, JSON), a page with the curve, and a recipe for compile is written.
    Under --fail-if the suggestion is the smallest model that meets all conditions, and otherwise
    the knee of the curve.
    """
    from graphprune.sweep.axes import USUAL, settings

    goals = {"target": target, "remove": remove, "shape": shape}
    words = {"score": score, "repair": repair, "effort": effort, "method": sparsify}
    if recipe is None and not any(goals.values()) and sparsify is None and sparsity is None:
        goals = {**goals, **USUAL}
    with recorded(events, "sweep") as told, noted(), telling() as show_stage:
        progress = told.following(show_stage)
        use_threads(threads)
        points = settings(goals, words, sparsity)
        from graphprune.sweep import sweep as sweeping
        from graphprune.sweep.table import render

        found = sweeping.sweep(
            source,
            points,
            output,
            recipe=recipe,
            flags={
                "exclude": exclude,
                "include": include,
                "text": text,
                "data": data,
                "seed": seed,
                "device": device,
                "memory": memory,
                "fail_if": fail_if,
            },
            by_layer=by_layer,
            overwrite=overwrite,
            resume=resume,
            weights=weights,
            trust=trust,
            allow_unused_weights=unused,
            progress=progress,
        )
        told.tell("result", sweep=found.as_data())
    show(found.to_json() if as_json else render(found))
