"""What a model has to be before anything is computed with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.checkpoints.shards import without_weights
from graphprune.errors import LoadError
from graphprune.ir.torch.program import Program
from graphprune.oracle.verification import Certificate
from graphprune.oracle.verify import verify
from graphprune.passes.shared.reduce import PIECE
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Recipe
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


def check_weights(program: BaseProgram) -> None:
    """Refuse weights that are missing or not finite: every number that follows would be wrong.

    Raises:
        LoadError: one is; the parameter is named.
    """
    for name in sorted(program.trainable):
        weight = program.weights[name]
        if weight.is_meta:
            raise without_weights(_directory(program), name)
        broken = sum(int((~piece.isfinite()).sum()) for piece in _pieces(weight))
        if broken:
            raise LoadError(
                "a weight is not a finite number",
                where=f"parameter {name}",
                why=f"{broken} of {weight.numel()} are NaN or infinite",
                hint="repair the checkpoint",
            )


def has_weights(program: BaseProgram) -> bool:
    """Whether the weights have values, which plans for sizes alone don't need."""
    return not any(program.weights[name].is_meta for name in program.trainable)


def _directory(program: BaseProgram) -> Path | None:
    source = program.source if isinstance(program, Program) else None
    return source.path if source is not None else None


def _pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts of a tensor, so that what is computed from it isn't as large as it is."""
    rows = weight.detach().reshape(weight.shape or (1,))
    return torch.split(rows, max(1, PIECE * len(rows) // max(1, rows.numel())))


def prove(program: BaseProgram, plan: Plan, slim: Slim | SlimOnnx, recipe: Recipe) -> Certificate:
    """Compare a slim model with the masked one, as a recipe says.

    Raises:
        VerifyError: they differ.
    """
    wanted = recipe.verify
    dtypes = {"auto": None, "float32": torch.float32, "float64": torch.float64}
    certificate = verify(
        program,
        plan,
        slim,
        dtype=dtypes[wanted.dtype],
        tolerance=wanted.tolerance,
        seed=recipe.seed,
    )
    certificate.raise_if_failed()
    return certificate
