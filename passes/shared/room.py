"""Scores on a device that may be too small for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import CalibrationError
from graphprune.passes.shared.score import Inputs, Score
from graphprune.placement import let_go, present
from graphprune.plan.units import FloatArray


def score_on_device(
    score: Score, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
) -> dict[str, FloatArray]:
    """Score units; with half as many samples at a time where the device has no room for more.

    Raises:
        CalibrationError: it has no room for those either.
        GraphPruneError: see the score.
    """
    try:
        return score.score(program, structures, inputs)
    except torch.OutOfMemoryError as error:
        smaller = _smaller(score)
        if smaller is None:
            raise _no_room(score, program) from error
    let_go(present().device)
    try:
        return smaller.score(program, structures, inputs)
    except torch.OutOfMemoryError as error:
        raise _no_room(smaller, program) from error


def _smaller(score: Any) -> Score | None:
    """The score with half its batch, which no result depends on; None where it has none."""
    batch = getattr(score, "batch", 1)
    if not dataclasses.is_dataclass(score) or not isinstance(batch, int) or batch < 2:
        return None
    return dataclasses.replace(score, batch=batch // 2)  # type: ignore[type-var, return-value]


def _no_room(score: Score, program: BaseProgram) -> CalibrationError:
    place, size = present(), program.costs.total().bytes
    return CalibrationError(
        f"there isn't enough memory on {place} for the score",
        where=type(score).__name__,
        why=f"the weights are {size / 1e9:.1f} GB, and gradients need all of them there at once",
        hint="give shorter samples (calibration.length), take a score without gradients (wanda-sp, "
        "flap, magnitude), or calibrate on the processor (device: cpu)",
    )
