"""The whole way from a source to files: load, check, run the passes, prove, write, measure.

:func:`compile` is the one place that knows the order of things. Nothing is written before the slim
model has been compared with the masked one, and all of it beside its place and then renamed: what a
failed or interrupted run leaves behind is at most what it can go on from (see
`graphprune.pipeline.resume`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.emit.formats import check_formats, native_form, with_formats
from graphprune.emit.places import mapped_by, mapped_from, read_by
from graphprune.emit.target import Target
from graphprune.errors import RecipeError
from graphprune.files.sources import reading
from graphprune.measure.early import check_measurable, deep_cuts_ahead
from graphprune.passes.protocol import State
from graphprune.pipeline.before.dry_run import forecast, with_output
from graphprune.pipeline.before.estimate import Estimate
from graphprune.pipeline.checking import check_weights, has_weights
from graphprune.pipeline.choices import choose_methods, gives_data
from graphprune.pipeline.default_data import with_data
from graphprune.pipeline.driver import (
    build_passes,
    check_passes,
    described,
    plan_alone,
    run_passes,
)
from graphprune.pipeline.finish import finish
from graphprune.pipeline.opening import open_source, placed, settle
from graphprune.pipeline.reporting import first_report
from graphprune.pipeline.run import Run
from graphprune.pipeline.sharing import claimed, journaled
from graphprune.placement import Placement, on_device
from graphprune.plan.plan import Plan
from graphprune.plan.selector import named
from graphprune.preflight.checks import check_request
from graphprune.preflight.readers import check_read
from graphprune.progress import Note
from graphprune.provenance.making import Making
from graphprune.provenance.swept import sweep_beside
from graphprune.ranks.group import current
from graphprune.recipe.recipe import Recipe
from graphprune.report.report import Report
from graphprune.rewrite.apply import uncut
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx

Progress = Callable[[str], None]


def compile(
    source: str | Path | torch.nn.Module | BaseProgram,
    recipe: Recipe | Mapping[str, object] | str | Path,
    output: str | Path | None = None,
    formats: Sequence[str] | None = None,
    *,
    dry_run: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    resume: bool = False,
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    memory: int | None = None,
    trust: bool = False,
    allow_unused_weights: bool = False,
    recipe_file: str | Path | None = None,
) -> Report:
    """Prune a model and write it.

    A run that prunes weights with data saves its progress in ``.NAME.state`` beside the output,
    which is gone when the output is in place. An exception that leaves it there has a note that
    says so.

    Processes share the work where all of them call this within `graphprune.ranks.together`. The
    first one writes.

    Args:
        source: a checkpoint directory, hub id, ``.pt2`` or ``.onnx`` file or ``module:factory``; a
            module with an `example`; or a program.
        recipe: a recipe, its plain data, or the path of a YAML file.
        output: a directory, or a ``.pt2`` or ``.onnx`` file; None only with `dry_run`.
        formats: hf, onnx, onnx-decoder, pt2; overrides the recipe's. The Hugging Face files are
            put into the output directory itself, the others are model.onnx, decoder.onnx and
            model.pt2 in it. Where neither says anything it is hf for a checkpoint, onnx for ONNX,
            and pt2 for everything else.
        dry_run: plan and report what would happen; write nothing.
        seed: overrides the recipe's.
        progress: called with the name of each stage as it begins.
        overwrite: replace an output that exists, if it is one of ours or a file, and drop what an
            interrupted run has left, unless it is to go on.
        resume: go on from where an interrupted run with the same recipe, model and data stopped,
            to the same files; begin if there is none.
        example: example inputs of a module: positional, or by keyword.
        weights: a safetensors file with the state dict of a factory's module.
        device: where to calibrate, overriding the recipe's: ``auto``, ``cpu``, ``cuda:1``.
        memory: bytes of the device that may be taken, overriding the recipe's.
        trust: whether a checkpoint or a ``.pt2`` file may run code of its own.
        allow_unused_weights: see `graphprune.load`; the report has a note then.
        recipe_file: where a recipe was read from that is given as such: the report has the curve of
            the sweep that wrote it.

    Raises:
        GraphPruneError: something that the caller can put right; nothing has been written then.
        VerifyError: the slim model doesn't equal the masked one; nothing has been written.
    """
    ranks = current()
    settled = settle(recipe, formats, seed, device, memory)
    asked = {"dry_run": dry_run, "overwrite": overwrite, "resume": resume, "trust": trust}

    def check() -> None:
        check_request(source, settled, output, recipe, example, weights, **asked, progress=progress)

    ranks.first(check)
    placement = Placement.of(settled.device, settled.memory)
    settled = with_formats(settled, source, output)
    reads = read_by(source, recipe, settled, weights)
    if dry_run and output is not None:
        settled = with_output(settled, output, overwrite, reads)
    target = None
    if not dry_run:
        target = ranks.first(lambda: Target.of(output, settled, overwrite, reads))
    with claimed(target) as target, reading(mapped_from(source, weights)) as sources:
        tell = sources.checking(progress or (lambda stage: None))
        opening = {"trust": trust, "allow_unused_weights": allow_unused_weights}
        making = Making(source, weights, opening, sweep_beside(recipe_file or recipe))
        tell("loading and tracing")
        start = time.perf_counter()
        dense = named(open_source(source, example, weights, opening), settled.own_names)
        sources.add(mapped_by(dense))
        seconds = {"loading and tracing": round(time.perf_counter() - start, 3)}
        run = Run(dense, settled, tell, making, dry=target is None, seconds=seconds)
        formats = target.formats if target else settled.formats
        ranks.agree(lambda: _check(run, source, formats))
        _settle(run)
        placement = placed(dense, placement, settled)
        with journaled(run, source, target, resume), on_device(placement):
            estimate = None if run.dry else Estimate.of(run.recipe, dense, placement)
            if estimate is not None:
                tell(Note(estimate))
            return _run(run, source, target, formats)


def _check(run: Run, source: object, formats: Sequence[str]) -> None:
    """Refuse what can't work with this model, before data is read and anything is computed."""
    program, recipe = run.dense, run.recipe
    check_read(recipe, program.is_causal)
    check_formats(formats, program, source)
    check_passes(build_passes(recipe.passes), State.of(program), run)
    check_measurable(program, recipe)
    if not run.dry or has_weights(program):
        with run.stage("checking weights"):
            check_weights(program)


def _settle(run: Run) -> None:
    """Choose what the recipe leaves open: scores, repair, data."""
    run.given = gives_data(run.recipe)
    deep = deep_cuts_ahead(run.dense, run.recipe)
    for note in deep:
        run.progress(Note(note))
    found = choose_methods(run.recipe, run.dense, surgery=True, deep=bool(deep))
    run.open, run.notes = found.open, found.notes
    check_read(found.recipe, run.dense.is_causal)
    run.recipe = with_data(found.recipe, run.dense)


def _run(run: Run, source: object, target: Target | None, formats: Sequence[str]) -> Report:
    """Run the passes, then cut, prove, write and measure."""
    ranks = current()

    def check(slim: Slim | SlimOnnx) -> tuple[bool | None, tuple[str, ...]]:
        if target is not None:
            target.check_space(slim.cost.bytes)
            if slim.program.format == "onnx":
                cast("SlimOnnx", slim).check_output(target.path)
        with run.stage("checking the formats"):
            if "hf" in formats:  # which no ONNX graph has
                return native_form(cast("Slim", slim), run.recipe)
        return run.form

    def planned(state: State) -> None:
        slim = uncut(state.program, state.plan)
        run.form = ranks.first(lambda: check(slim))
        first_report(run, state, slim, source)  # conditions on sizes

    state = run_passes(run, State.of(run.dense), planned)
    slim = uncut(state.program, state.plan)
    report = first_report(run, state, slim, source)
    if target is None:
        return forecast(report, run.recipe, run.dense, slim, described(run, state))
    return ranks.first(lambda: finish(run, state, report, target))


def choose(program: BaseProgram, recipe: Recipe) -> Plan:
    """The plan that `compile` makes of a recipe; nothing is cut or written.

    Raises:
        RecipeError: the recipe also asks for masks, which no plan can hold, or chooses by training.
        GraphPruneError: see `compile`.
    """
    if recipe.masks:
        raise RecipeError(
            "a plan says nothing of single weights",
            where="sparsify",
            hint="use graphprune.compile, or graphprune.sparsify on the program",
        )
    program = named(program, recipe.own_names)
    settled = choose_methods(recipe, program, surgery=False)
    run = Run(program, settled.recipe, lambda stage: None, open=settled.open)
    return plan_alone(run, State.of(program)).plan
