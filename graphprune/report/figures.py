"""The figures of a report that nothing has to be run for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graphprune.analysis.cost import Cost
from graphprune.analysis.program import BaseProgram
from graphprune.quality.measures import Measures
from graphprune.quality.perplexity import size_on_disk
from graphprune.report.report import Report


def measures_of(program: BaseProgram, cost: Cost) -> Measures:
    """A model's sizes, and the input that its multiply-accumulates are of."""
    workload = program.workload
    shapes = dict(workload.shapes)
    return Measures(cost.params, cost.macs, cost.bytes, input=str(workload), inputs=shapes)


def with_files(report: Report, dense: BaseProgram, written: Path) -> Report:
    """The report with the sizes of the dense model's files, if it has any, and of the slim one's.

    Args:
        report: the report so far.
        dense: what was read.
        written: the checkpoint or file that was written; of several formats the first.
    """
    before = None if dense.origin is None else size_on_disk(dense.origin)
    return replace(
        report,
        before=replace(report.before, files=before),
        after=replace(report.after, files=size_on_disk(written)),
    )
