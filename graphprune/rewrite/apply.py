"""Applying a plan, for programs of every kind of graph."""

from __future__ import annotations

from typing import overload

from graphprune.analysis.program import BaseProgram
from graphprune.errors import PlanError
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Plan
from graphprune.rewrite import slim as torch_slim
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


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
