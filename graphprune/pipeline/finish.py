"""The end of a compilation: cut, prove, write, measure."""

from __future__ import annotations

from dataclasses import replace

from graphprune.emit.formats import form_written
from graphprune.emit.target import Target
from graphprune.measure.compare import measured
from graphprune.passes.protocol import State
from graphprune.pipeline.checking import in_pieces, little_proof
from graphprune.pipeline.controls import with_controls
from graphprune.pipeline.run import Run
from graphprune.pipeline.written.files import check_weights_written
from graphprune.provenance.recording import record
from graphprune.report.figures import with_files
from graphprune.report.report import Report
from graphprune.rewrite.apply import apply


def finish(run: Run, state: State, report: Report, target: Target) -> Report:
    """Cut the model, compare it with the masked one, and write and measure it.

    Args:
        run: the run.
        state: what the passes have made.
        report: what is known so far.
        target: where to write.

    Raises:
        VerifyError: the slim model doesn't equal the masked one, or a file doesn't hold it.
        GraphPruneError: it can't be written.
    """
    with run.stage("cutting"):
        slim = apply(state.program, state.plan, folder=target.path.parent)
    certificate = run.prove(state.program, state.plan, slim)
    # Refitted weights read nothing of what goes, so that its going shows no effect by itself.
    shows = not (report.refits or report.trained) and (
        state.plan.kept_units or report.masks is not None
    )
    report = replace(
        report,
        max_abs_error=certificate.max_abs_error,
        verified_in=certificate.dtype,
        notes=(
            *report.notes,
            *(little_proof(certificate) if shows else ()),
            *in_pieces(certificate),
        ),
        outputs=tuple(target.shown(name) for name in target.formats),
    )
    with target.staging() as staged:
        for name in target.formats:
            file = staged / target.name(name)
            with run.stage(f"writing {name}"):
                slim.save(file, name)
            report = check_weights_written(report, file, name, slim)
        if "hf" in target.formats:
            report = form_written(report, staged, run.recipe)
        report = with_files(report, run.dense, staged / target.name(target.formats[0]))
        with run.stage("measuring"):
            onnx = staged / target.name("onnx") if "onnx" in target.formats else None
            report = measured(report, run.recipe, slim, onnx, staged, run.dense, run.progress)
        report = with_controls(run, report)
        report = record(
            staged, target, run.making, report, recipe=run.recipe, plan=state.plan,
            program=run.dense, auto="score" in run.open, tell=run.progress,
        )  # fmt: skip
        run.progress("putting the files in place")
    return report
