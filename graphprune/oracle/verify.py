"""Proving that a slim model equals the masked one, for programs of every kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.errors import VerifyError
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.interpreter import Inputs
from graphprune.ir.torch.program import Program
from graphprune.oracle.verification import Certificate
from graphprune.oracle.verification import verify as verify_torch
from graphprune.oracle.verification_onnx import SlimGraph, verify_onnx
from graphprune.plan.plan import Plan


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
    verify_format = _VERIFY[program.format]
    return verify_format(program, plan, slim, inputs, dtype, tolerance, seed)


def _verify_torch(
    program: Program,
    plan: Plan,
    slim: Any,
    inputs: Any,
    dtype: torch.dtype | None,
    tolerance: float | None,
    seed: int,
) -> Certificate:
    if isinstance(inputs, Mapping):
        raise VerifyError("a traced program is run on (args, kwargs)")
    return verify_torch(program, plan, slim, inputs, dtype=dtype, tolerance=tolerance, seed=seed)


def _verify_onnx(
    program: OnnxProgram,
    plan: Plan,
    slim: Any,
    inputs: Any,
    dtype: torch.dtype | None,
    tolerance: float | None,
    seed: int,
) -> Certificate:
    del dtype  # ONNX Runtime computes in the model's own
    if not isinstance(slim, SlimGraph | Path) or not isinstance(inputs, Mapping | None):
        raise VerifyError("an ONNX program is compared with a slim ONNX model, on named arrays")
    return verify_onnx(program, plan, slim, inputs, tolerance=tolerance, seed=seed)


_VERIFY: Mapping[GraphFormat, Callable[..., Certificate]] = {
    "torch": _verify_torch,
    "onnx": _verify_onnx,
}
