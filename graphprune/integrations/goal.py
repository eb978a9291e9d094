"""What a pipeline's step is told to remove, and how it is carried out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, overload

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.errors import RecipeError
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.oracle.verify import verify
from graphprune.pipeline.compiler import choose
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.rewrite.apply import apply
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx

Choice: TypeAlias = Plan | Recipe | Mapping[str, object] | str | Path
"""A plan, a recipe, its plain data, or the path of a recipe in YAML."""


def settle(choice: Choice | None, settings: Mapping[str, object]) -> Plan | Recipe:
    """Understand what is wanted, before there is a model.

    Args:
        choice: the plan or recipe; None where `settings` say everything.
        settings: keys of a recipe; they win over those of `choice`.

    Raises:
        RecipeError: there is nothing to do, or the recipe can't be understood.
    """
    if isinstance(choice, Plan):
        if settings:
            raise RecipeError(
                "a plan leaves nothing to choose",
                where=", ".join(settings),
                hint="give the plan alone, or a recipe with these settings",
            )
        return choice
    if isinstance(choice, str | Path):
        choice = Recipe.load(choice)
    if isinstance(choice, Recipe):
        choice = choice.model_dump(exclude_unset=True)
    return Recipe.parse({**(choice or {}), **settings})


@overload
def carry_out(program: Program, goal: Plan | Recipe, *, check: bool) -> Slim: ...
@overload
def carry_out(program: OnnxProgram, goal: Plan | Recipe, *, check: bool) -> SlimOnnx: ...
def carry_out(program: BaseProgram, goal: Plan | Recipe, *, check: bool) -> Slim | SlimOnnx:
    """Choose, cut and compare with the masked model; nothing is written.

    Args:
        program: the dense program.
        goal: what `settle` gave.
        check: whether to compare.

    Raises:
        PlanError: the goal can't be reached, or the plan was made for another model.
        VerifyError: the slim model doesn't equal the masked one.
    """
    plan = goal if isinstance(goal, Plan) else choose(program, goal)
    slim = apply(program, plan)
    if not check or not plan.kept_units:
        return slim
    wanted = goal.verify if isinstance(goal, Recipe) else None
    certificate = verify(
        program,
        plan,
        slim,
        dtype=getattr(torch, wanted.dtype) if wanted and wanted.dtype != "auto" else None,
        tolerance=wanted.tolerance if wanted else None,
        seed=goal.seed if isinstance(goal, Recipe) else 0,
    )
    certificate.raise_if_failed()
    if certificate.dense_difference <= certificate.tolerance:
        warnings.warn(
            "random inputs show no effect of pruning, so that the comparison with the masked "
            "model says little: verify with inputs of your own",
            stacklevel=3,
        )
    return slim
