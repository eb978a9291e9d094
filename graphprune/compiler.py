"""The whole way from a source to files: load, plan, rewrite, verify, write, measure.

:func:`compile` is the one place that knows the order of things. Nothing is written before the slim
model has been compared with the masked one, and everything is written beside its place and then
renamed, so that a failed or interrupted run leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphprune import evaluate
from graphprune.calibration import read_text, windows
from graphprune.emit.hf import precheck
from graphprune.errors import EmitError, LoadError, RecipeError, VerifyError
from graphprune.files import replacing
from graphprune.frontends import load
from graphprune.frontends.module import trace
from graphprune.passes.select import select
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.recipe import FORMATS, Recipe
from graphprune.report import Measures, Report
from graphprune.rewrite.slim import Slim, apply
from graphprune.verify import verify

PLAN_FILE = "graphprune_plan.json"
REPORT_FILE = "report.json"

Progress = Callable[[str], None]


def compile(
    source: object,
    recipe: Recipe | Mapping[str, object] | str | Path | None,
    output: str | Path | None = None,
    formats: Sequence[str] | None = None,
    *,
    dry_run: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
    plan: Plan | str | Path | None = None,
    overwrite: bool = False,
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Report:
    """Prune a model and write it.

    Args:
        source: a checkpoint directory, hub id or ``.pt2`` file; a module with an `example`; or a
            program.
        recipe: a recipe, its plain data, or the path of a YAML file; None only with a `plan`.
        output: a directory, or a ``.pt2`` or ``.onnx`` file; None only with `dry_run`.
        formats: hf, onnx, pt2; overrides the recipe's. The Hugging Face files are put into the
            output directory itself, the others are model.onnx and model.pt2 in it.
        dry_run: plan and report what would happen; write nothing.
        seed: overrides the recipe's.
        progress: called with the name of each stage as it begins.
        plan: a plan, or the path of one, to apply instead of making one.
        overwrite: replace an output that exists.
        example: example inputs of a module: positional, or by keyword.

    Raises:
        GraphPruneError: something that the caller can put right; nothing has been written then.
        VerifyError: the slim model doesn't equal the masked one; nothing has been written.
    """
    settled = _settle(recipe, formats, seed, has_plan=plan is not None)
    target = None if dry_run else Target.of(output, settled, overwrite)
    run = _Run(settled, progress or (lambda stage: None))
    program = run.load(source, example)
    chosen = run.plan(program, plan)
    native, notes = run.expressible(program, chosen, target.formats if target else settled.formats)
    dense = Measures(**_cost(program.costs.total()))
    slim = Slim(program, chosen, chosen.bind(program))
    report = Report(
        source=_name_of(source),
        before=dense,
        after=Measures(**_cost(slim.cost)),
        kept=_kept(program, chosen),
        native=native,
        notes=notes,
        seconds=run.seconds,
    )
    if target is None:
        return report
    return run.write(program, chosen, report, target)
