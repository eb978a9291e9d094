"""What can be said of a compilation's quality, and of its conditions, before it takes its time."""

from __future__ import annotations

from dataclasses import replace

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.errors import EvaluationError, PlanError, RecipeError
from graphprune.measure.measuring import unmeasurable
from graphprune.measure.remarks import deep_cuts
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.select import select
from graphprune.quality.conditions import QUALITY, SIZES, ask_for, check_conditions, parse_all
from graphprune.quality.perplexity import check_causal
from graphprune.recipe.recipe import Recipe
from graphprune.report.report import Report
from graphprune.rewrite.apply import uncut
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


def check_measurable(program: BaseProgram, recipe: Recipe) -> None:
    """See that a recipe's conditions can be evaluated.

    Args:
        program: the dense program, with the recipe's names.
        recipe: the recipe.

    Raises:
        RecipeError: a condition is about the quality of a model that has no perplexity.
    """
    if ask_for(parse_all(recipe.fail_if), QUALITY):
        why = unmeasurable(program, recipe.calibration) or _looks_ahead(program)
        if why is not None:
            raise RecipeError(
                "the quality that fail_if asks for can't be measured",
                where=f"fail_if: {', '.join(recipe.fail_if)}",
                why=why,
                hint=f"give conditions on {', '.join(SIZES)} only, or a tokenizer with "
                "calibration.tokenizer",
            )


def with_sizes(report: Report, recipe: Recipe, slim: Slim | SlimOnnx) -> Report:
    """A report with what its plan says of quality.

    Raises:
        ConditionError: the slim model has a size that it must not have.
    """
    check_conditions(parse_all(recipe.fail_if), report.before, report.after, None, SIZES)
    return replace(report, notes=(*deep_cuts(recipe, slim), *report.notes))


def _looks_ahead(program: BaseProgram) -> str | None:
    """Why a model of token ids is no causal language model, by what it makes of a few tokens."""
    model = program.as_module()
    try:
        with torch.inference_mode():
            check_causal(model, torch.zeros(1, 8, dtype=torch.long))
    except EvaluationError as error:
        return error.why
    return None


def deep_cuts_ahead(program: BaseProgram, recipe: Recipe) -> tuple[str, ...]:
    """What there is to say of deep cuts by a plan that is still to be made.

    How many units of a width stay doesn't depend on which do, where every layer loses as many.
    """
    if len(recipe.selections) != 1 or recipe.plans:
        return ()
    (wanted,) = recipe.selections
    if wanted.target is None or not wanted.uniform:
        return ()
    try:
        plan = select(
            program,
            target=wanted.target,
            score=Random(),
            exclude=wanted.exclude,
            include=wanted.include,
            align=wanted.align,
            minimum=wanted.minimum,
            notes=[],  # told where the plan is made
        )
    except PlanError:  # said where the plan is made
        return ()
    return deep_cuts(recipe, uncut(program, plan))
