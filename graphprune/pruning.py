"""Applying a plan and proving the result, for programs of every kind of graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from graphprune.errors import PlanError, VerifyError
from graphprune.masked import Inputs
from graphprune.onnx_program import OnnxProgram, SlimOnnx
from graphprune.plan import Plan
from graphprune.program import BaseProgram, Program
from graphprune.rewrite import slim as torch_slim
from graphprune.rewrite.slim import Slim
from graphprune.verification import Certificate
from graphprune.verification import verify as verify_torch
from graphprune.verification_onnx import verify_onnx


@overload
def apply(program: Program, plan: Plan, *, consume: bool = False) -> Slim: ...
@overload
def apply(program: OnnxProgram, plan: Plan, *, consume: bool = False) -> SlimOnnx: ...
@overload
def apply(program: BaseProgram, plan: Plan, *, consume: bool = False) -> Slim | SlimOnnx: ...
def apply(program: BaseProgram, plan: Plan, *, consume: bool = False) -> Slim | SlimOnnx:
    """Rewrite a program for a plan.

    Args:
        program: the dense program.
        plan: what to keep.
        consume: take the dense weights apart while cutting, so that no second copy of the model
            is needed; the dense program and module can't be used afterwards. The weights of an
            ONNX file are never held in memory.

    Returns:
        The slim model.

    Raises:
        PlanError: the plan was made for another model.
    """
    if isinstance(program, OnnxProgram):
        return SlimOnnx(program, plan)
    if isinstance(program, Program):
        return torch_slim.apply(program, plan, consume=consume)
    raise PlanError(f"a {type(program).__name__} can't be rewritten")


def uncut(program: BaseProgram, plan: Plan) -> Slim | SlimOnnx:
    """The slim model before anything is cut: its sizes and costs are known, its weights dense.

    Raises:
        PlanError: the plan was made for another model.
    """
    if isinstance(program, OnnxProgram):
        return SlimOnnx(program, plan)
    assert isinstance(program, Program)
    return Slim(program, plan, plan.bind(program))


def verify(
    program: BaseProgram,
    plan: Plan,
    slim: Any,
    inputs: Inputs | Sequence[Inputs] | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Certificate:
    """Compare a slim model with the masked one.

    Args:
        program: the dense program.
        plan: what was applied to it.
        slim: the result; for ONNX also the path of a file.
        inputs: (args, kwargs), or a list of such; for ONNX input name to array; None for random
            ones.
        dtype: float64 or float32; None for float64 where memory allows it. ONNX Runtime computes
            in the model's own.
        tolerance: the difference allowed, in parts of max(1, largest value of the output); None
            for 1e-9 in float64 and 1e-4 in float32.
        seed: of the random inputs.

    Raises:
        PlanError: the plan doesn't belong to the program.
        VerifyError: one of the models can't be run on these inputs.
    """
    if isinstance(program, OnnxProgram):
        if not isinstance(slim, SlimOnnx | Path) or not isinstance(inputs, Mapping | None):
            raise VerifyError("an ONNX program is compared with a slim ONNX model, on named arrays")
        return verify_onnx(program, plan, slim, inputs, tolerance=tolerance, seed=seed)
    if not isinstance(program, Program) or isinstance(inputs, Mapping):
        raise VerifyError("a traced program is run on (args, kwargs)")
    return verify_torch(program, plan, slim, inputs, dtype=dtype, tolerance=tolerance, seed=seed)
