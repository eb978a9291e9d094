"""What a model has to be before anything is computed with it, and when that is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.checkpoints.shards import without_weights
from graphprune.errors import LoadError
from graphprune.oracle.verification import Certificate
from graphprune.oracle.verify import verify
from graphprune.passes.shared.reduce import PIECE
from graphprune.plan.plan import Plan
from graphprune.recipe.recipe import Verification
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
    source = program.source
    return source.path if source is not None else None


def _pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts of a tensor, so that what is computed from it isn't as large as it is."""
    rows = weight.detach().reshape(weight.shape or (1,))
    return torch.split(rows, max(1, PIECE * len(rows) // max(1, rows.numel())))


def prove(
    program: BaseProgram, plan: Plan, slim: Slim | SlimOnnx, wanted: Verification, seed: int
) -> Certificate:
    """Compare a slim model with the masked one.

    Args:
        program: the dense program, with its present weights.
        plan: what stays.
        slim: the slim model.
        wanted: how they are compared.
        seed: of the inputs.

    Raises:
        VerifyError: they differ.
    """
    dtypes = {"auto": None, "float32": torch.float32, "float64": torch.float64}
    certificate = verify(
        program,
        plan,
        slim,
        dtype=dtypes[wanted.dtype],
        tolerance=wanted.tolerance,
        seed=seed,
    )
    certificate.raise_if_failed()
    return certificate


def in_pieces(certificate: Certificate) -> tuple[str, ...]:
    """What to say of a quantised model, whose rounding makes steps of the smallest differences."""
    if not certificate.steps:
        return ()
    return (
        f"compared at {certificate.steps} quantisation steps, from one to the next; "
        f"all in one, outputs differ by {certificate.drift:.1e}",
    )


def little_proof(certificate: Certificate) -> tuple[str, ...]:
    """What to say where the inputs would have hidden a wrong cut."""
    if certificate.dense_difference > certificate.tolerance:
        return ()
    return (
        "random inputs show no effect of pruning, so that the comparison with the masked model "
        "says little: verify with inputs of your own",
    )
