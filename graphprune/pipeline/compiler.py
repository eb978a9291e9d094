"""The whole way from a source to files: load, plan, rewrite, verify, write, measure.

:func:`compile` is the one place that knows the order of things. Nothing is written before the slim
model has been compared with the masked one, and all of it beside its place and then renamed: what a
failed or interrupted run leaves behind is at most what it can go on from (see
`graphprune.pipeline.resume`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.dense import check_dense
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.amounts import REPAIRS, SCORES
from graphprune.emit.formats import check_formats, form_written, native_form, shown, with_formats
from graphprune.emit.places import mapped_by, mapped_from, read_by
from graphprune.emit.target import Target
from graphprune.errors import CalibrationError, RecipeError
from graphprune.files.sources import Sources, reading
from graphprune.frontends.hf.fit import unused_note
from graphprune.measure.compare import measured
from graphprune.measure.early import check_measurable, with_sizes
from graphprune.passes.repair.structured import Repaired
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.select import select
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Score
from graphprune.pipeline.checking import check_weights, has_weights, prove
from graphprune.pipeline.default_data import with_data
from graphprune.pipeline.defaults import (
    changes_weights,
    check_structures,
    gives_data,
    in_pieces,
    little_proof,
    with_score,
    without_fallback,
    without_surgery,
)
from graphprune.pipeline.dry_run import check_repair, forecast, sizes_are_known, with_output
from graphprune.pipeline.masking import (
    Masked,
    check_masks,
    counted,
    mask,
    planned,
    samples_for,
    together,
)
from graphprune.pipeline.opening import open_source, settle
from graphprune.pipeline.repairing import (
    ByRole,
    chosen_by_surgery,
    may_be_refitted,
    repaired,
    stood_in,
    with_places,
)
from graphprune.pipeline.resume import Journal, facts_of
from graphprune.pipeline.rounds import composed, interim_goal
from graphprune.plan.plan import Plan
from graphprune.plan.selector import named
from graphprune.preflight.checks import check_request
from graphprune.preflight.readers import check_read
from graphprune.provenance.making import Making
from graphprune.provenance.recording import record
from graphprune.recipe.recipe import Recipe
from graphprune.report.figures import measures_of, with_files
from graphprune.report.goals import rounding_notes
from graphprune.report.kept import kept_units
from graphprune.report.masks import Refits
from graphprune.report.report import Report
from graphprune.rewrite.apply import apply, uncut
from graphprune.rewrite.retrace import retrace
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
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Report:
    """Prune a model and write it.

    A run that prunes weights with data saves its progress in ``.NAME.state`` beside the output,
    which is gone when the output is in place. An exception that leaves it there has a note that
    says so.

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
        trust: whether a checkpoint or a ``.pt2`` file may run code of its own.
        allow_unused_weights: see `graphprune.load`; the report has a note then.

    Raises:
        GraphPruneError: something that the caller can put right; nothing has been written then.
        VerifyError: the slim model doesn't equal the masked one; nothing has been written.
    """
    settled = settle(recipe, formats, seed)
    asked = {"dry_run": dry_run, "overwrite": overwrite, "resume": resume, "trust": trust}
    check_request(source, settled, output, recipe, example, weights, **asked, progress=progress)
    settled = with_formats(settled, source, output)
    reads = read_by(source, recipe, settled, weights)
    if dry_run and output is not None:
        settled = with_output(settled, output, overwrite, reads)
    target = None if dry_run else Target.of(output, settled, overwrite, reads)
    claim: AbstractContextManager[Target | None] = target.claimed() if target else nullcontext()
    with claim as target, reading(mapped_from(source, weights)) as sources:
        opening = {"trust": trust, "allow_unused_weights": allow_unused_weights}
        making = Making(source, weights, opening)
        run = _Run(settled, sources.checking(progress or (lambda stage: None)), making)
        return _compile(run, source, target, sources, resume, example, weights)


def _compile(
    run: _Run,
    source: str | Path | torch.nn.Module | BaseProgram,
    target: Target | None,
    sources: Sources,
    resume: bool,
    example: tuple[Any, ...] | Mapping[str, Any] | None,
    weights: str | Path | None,
) -> Report:
    """Compile within a run that has its output, and whose sources are watched."""
    settled, dry_run = run.recipe, target is None
    with run.stage("loading and tracing"):
        program = named(open_source(source, example, weights, run.making.opening), settled.names)
    sources.add(mapped_by(program))
    wanted = target.formats if target else settled.formats
    check_read(settled, program.is_causal)
    check_formats(wanted, program, source)
    check_structures(program, settled)
    check_masks(program, settled)
    check_measurable(program, settled, run.progress)
    if not dry_run or has_weights(program):
        with run.stage("checking weights"):
            check_weights(program)
    if settled.removes:
        run.auto = settled.score.name == "auto"
        run.fallible = run.auto and settled.repair.name == "auto"
        run.recipe, run.notes = with_score(settled, program, surgery=True)
        check_read(run.recipe, program.is_causal)
    run.given = gives_data(settled)
    run.recipe = settled = with_data(run.recipe, program)
    journal = None
    if target is not None and changes_weights(settled):
        facts = facts_of(settled, source)
        journal = Journal.open(target.path, facts, resume=resume, overwrite=target.overwrite)
    with journal.kept() if journal else nullcontext():
        if target is not None and settled.sparsify is not None:
            run.read(program)
        found = run.narrow(program, journal, dry_run)
        plan = found.plan
        slim = uncut(found.program, plan)
        if target is not None:
            target.check_space(slim.cost.bytes)
            if isinstance(slim, SlimOnnx):
                slim.check_output(target.path)
        with run.stage("checking the formats"):
            native, notes = (
                native_form(slim, settled)
                if isinstance(slim, Slim) and "hf" in wanted
                else (None, ())
            )
        report = Report(
            source=shown(source),
            weights=None if weights is None else str(Path(weights).absolute()),
            before=measures_of(program, program.costs.total()),
            after=measures_of(slim.program, slim.cost),
            kept=kept_units(slim),
            score=run.recipe.score.name if settled.removes and not settled.plan else None,
            native=native,
            notes=(
                *unused_note(program),
                *notes,
                *run.notes,
                *rounding_notes(program, run.recipe, plan),
                *found.notes,
                *(run.samples.notes if run.samples else ()),
            ),
            seconds=run.seconds,
            masks=planned(found.program, slim, settled) if settled.sparsify else None,
            refits=Refits(run.refit_by, found.layers) if found.layers else None,
        )
        report = with_sizes(report, settled, slim)
        if target is None:
            return forecast(report, run.recipe, program, slim)
        return run.write(program, found.program, plan, report, target, journal)


def choose(program: BaseProgram, recipe: Recipe) -> Plan:
    """The plan that `compile` makes of a recipe; nothing is cut or written.

    Raises:
        RecipeError: the recipe also asks for masks, which no plan can hold.
        GraphPruneError: see `compile`.
    """
    if recipe.sparsify is not None:
        raise RecipeError(
            "a plan says nothing of single weights",
            where="sparsify",
            hint="use graphprune.compile, or graphprune.sparsify on the program",
        )
    run = _Run(with_score(recipe, program, surgery=False)[0], lambda stage: None)
    return run.choose(named(program, recipe.names))


@dataclass
class _Run:
    """One compilation.

    Attributes:
        recipe: what to do.
        progress: told of each stage.
        making: what it was told, and what it has read.
        seconds: time taken by the stages that are over.
        samples: what masks are calibrated on; None where there are none.
        auto: whether the score was left to us.
        fallible: whether the repair was, too: a model that can't be calibrated goes without.
        given: whether the data was not left to us.
        notes: for the report.
    """

    recipe: Recipe
    progress: Progress
    making: Making = field(default_factory=Making)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: Samples | None = None
    auto: bool = False
    fallible: bool = False
    given: bool = False
    notes: tuple[str, ...] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def read(self, program: BaseProgram) -> None:
        """Read what masks are calibrated on, and stop where the model makes no sense of it."""
        with self.stage("reading calibration data"):
            self.samples = samples_for(program, self.recipe, self.progress)
        if self.recipe.needs_data and not self.samples.own:
            with self.stage("checking the dense model"):
                check_dense(program, self.samples.judging)
        self.samples = together(program, self.samples)
        if self.recipe.sparsify is not None and self.recipe.sparsify.needs_data:
            self.making.use("masks", self.samples)

    @property
    def refit_by(self) -> str:
        """What gives layers the weights that they have in the end."""
        return self.recipe.repair.name if self.recipe.repairs else self.recipe.score.name

    def narrow(self, program: BaseProgram, journal: Journal | None, dry_run: bool) -> Repaired:
        """The plan, and the dense program with weights that suit it."""
        if dry_run and self.recipe.operates and self.recipe.rounds == 1:
            whole = {} if self.auto else unjudged(get_score("obs"), program)
            counted = self._select(program, self._goal(program), None, ByRole({}, Random(), whole))
            check_repair(program, self.recipe, counted)
            if sizes_are_known(program, self.recipe, counted):
                return Repaired(program, counted, (), {})
        data = None
        if self.recipe.operates or (self.recipe.repairs_on_data and not dry_run):
            data = self._data(program)
        recipe = self.recipe
        if recipe.operates:
            with self.stage("choosing units"):
                found = chosen_by_surgery(
                    program,
                    recipe,
                    data,
                    lambda score: self._select(program, self._goal(program), data, score),
                    auto=self.auto,
                    progress=self.progress,
                    state=journal.state("units") if journal else None,
                )
            if self.auto:
                self.notes = (*self.notes, *stood_in(program, found.plan))
        else:
            plan = journal.plan() if journal else None
            found = Repaired(program, plan or self.choose(program), (), {})
        if journal is not None:
            journal.save_plan(found.plan)
        if not recipe.repairs or dry_run or not found.plan.kept_units:
            return found
        if self.fallible and not may_be_refitted(program, found.plan):
            self._note("no layer refitted: no weight multiplies by what goes")
            return found
        with self.stage("repairing weights"):
            return repaired(
                program,
                found.plan,
                recipe,
                data,
                progress=self.progress,
                state=journal.state("repair") if journal else None,
            )

    def _data(self, program: BaseProgram) -> Any:
        """What units are chosen and weights refitted with."""
        with self.stage("reading calibration data"):
            found = calibration_samples(
                program, self.recipe.calibration, self.recipe.seed, REPAIRS, self.progress
            )
        if not found.own:
            self._check_dense(program, found.judging)
        self.notes = (*self.notes, *found.notes)
        if self.recipe.repairs or self.recipe.operates:
            self.making.use("refits", found)
        return found.data

    def _check_dense(self, program: BaseProgram, data: Any) -> None:
        """Go without refits where a model makes no sense of the data, if both are our choice."""
        with self.stage("checking the dense model"):
            try:
                check_dense(program, data)
            except CalibrationError as error:
                if not self.fallible:
                    raise
                if self.given:
                    raise without_fallback(error) from error
                self.recipe, note = without_surgery(self.recipe, error)
                self.notes = (*self.notes, note)

    def _goal(self, program: BaseProgram) -> Mapping[str, Any]:
        return interim_goal(self.recipe, program, program, 1)

    def choose(self, program: BaseProgram) -> Plan:
        """The saved plan of the recipe, or a new one, made in as many rounds as it asks for."""
        if self.recipe.plan is not None:
            return Plan.load(self.recipe.plan)
        if not self.recipe.removes:
            return Plan(program.fingerprint, {})
        calibration = None
        if self.recipe.score_needs_data:
            with self.stage("reading calibration text"):
                found = calibration_samples(
                    program, self.recipe.calibration, self.recipe.seed, SCORES, self.progress
                )
                calibration = found.data
                self.making.use("scores", found)
        plan = Plan(program.fingerprint, {})
        slim, current = None, program
        for number in range(1, self.recipe.rounds + 1):
            suffix = f" ({number} of {self.recipe.rounds})" if self.recipe.rounds > 1 else ""
            with self.stage(f"selecting{suffix}"):
                chosen = self._select(current, interim_goal(self.recipe, program, current, number),
                                      calibration)  # fmt: skip
                plan = composed(slim, current, chosen) if slim else chosen
                if number < self.recipe.rounds:
                    slim = apply(program, plan)
                    current = named(retrace(slim), self.recipe.names)
        return plan

    def _select(
        self,
        program: BaseProgram,
        goal: Mapping[str, Any],
        calibration: Any,
        score: Score | None = None,
    ) -> Plan:
        recipe = self.recipe
        return select(
            program,
            **goal,
            score=score or recipe.score.model_dump(),
            exclude=recipe.exclude,
            include=recipe.include,
            uniform=recipe.uniform,
            align=recipe.align,
            minimum=recipe.minimum,
            aggregate=recipe.aggregate,
            normalize=recipe.normalize,
            seed=recipe.seed,
            calibration=calibration,
            notes=[],
            told=self._note,
        )

    def _note(self, what: str) -> None:
        if what not in self.notes:
            self.notes = (*self.notes, what)

    def write(
        self,
        dense: BaseProgram,
        program: BaseProgram,
        plan: Plan,
        report: Report,
        target: Target,
        journal: Journal | None,
    ) -> Report:
        """Apply, verify, mask, write and measure.

        Args:
            dense: what was read.
            program: it with weights that suit the plan.
            plan: what stays.
            report: what is known so far.
            target: where to write.
            journal: where progress is saved.
        """
        with self.stage("cutting"):
            slim = apply(program, plan)
        if plan.kept_units or report.masks is None:
            with self.stage("verifying"):
                certificate = prove(program, plan, slim, self.recipe)
        masked = None
        if report.masks is not None:
            masked = self._mask(program, slim, journal)
            program, report = masked.program, replace(report, masks=masked.masks)
            slim = apply(program, plan)
            with self.stage("verifying the masked weights"):
                certificate = prove(program, plan, slim, self.recipe)
        # Refitted weights read nothing of what goes, so that its going shows no effect by itself.
        looked = report.refits is None and (plan.kept_units or masked is None)
        little = little_proof(certificate) if looked else ()
        report = replace(
            report,
            max_abs_error=certificate.max_abs_error,
            verified_in=certificate.dtype,
            notes=(*report.notes, *little, *in_pieces(certificate)),
            outputs=tuple(target.shown(name) for name in target.formats),
        )
        with target.staging() as staged:
            for name in target.formats:
                with self.stage(f"writing {name}"):
                    slim.save(staged / target.name(name), name)
                file = staged / target.name(name)
                if masked is not None:
                    report = counted(report, file, name, slim, masked)
                report = with_places(report, file, name, slim)
            if "hf" in target.formats:
                report = form_written(report, staged, self.recipe)
            report = with_files(report, dense, staged / target.name(target.formats[0]))
            with self.stage("measuring"):
                onnx = staged / target.name("onnx") if "onnx" in target.formats else None
                report = measured(report, self.recipe, slim, onnx, staged, dense, self.progress)
            report = record(
                staged, target, self.making, report, recipe=self.recipe, plan=plan, program=dense,
                auto=self.auto, tell=self.progress,
            )  # fmt: skip
            self.progress("putting the files in place")
        return report

    def _mask(self, program: BaseProgram, slim: Slim | SlimOnnx, journal: Journal | None) -> Masked:
        """Make single weights of the slim model zero."""
        assert self.samples is not None
        state = journal.state("masks") if journal else None
        with self.stage("pruning weights"):
            return mask(
                program, slim, self.recipe, self.samples, progress=self.progress, state=state
            )
