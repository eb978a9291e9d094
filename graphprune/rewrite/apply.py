"""Applying a plan, for programs of every kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Plan
from graphprune.rewrite import slim as torch_slim
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


@overload
def apply(
    program: Program, plan: Plan, *, consume: bool = False, folder: Path | None = None
) -> Slim: ...
@overload
def apply(
    program: OnnxProgram, plan: Plan, *, consume: bool = False, folder: Path | None = None
) -> SlimOnnx: ...
@overload
def apply(
    program: BaseProgram, plan: Plan, *, consume: bool = False, folder: Path | None = None
) -> Slim | SlimOnnx: ...
def apply(
    program: BaseProgram, plan: Plan, *, consume: bool = False, folder: Path | None = None
) -> Slim | SlimOnnx:
    """Rewrite a program for a plan.

    Args:
        program: the dense program.
        plan: what to keep.
        consume: take the dense weights apart while cutting, so that no second copy of the model
            is needed; the dense program and module can't be used afterwards. The weights of an
            ONNX file are never held in memory.
        folder: where weights of a traced model are that are too many for memory, in files without
            a name; None for the temporary folder.

    Returns:
        The slim model.

    Raises:
        PlanError: the plan was made for another model.
        EmitError: the file system has no room for the weights.
    """
    return _APPLY[program.format](program, plan, consume=consume, folder=folder)


def uncut(program: BaseProgram, plan: Plan) -> Slim | SlimOnnx:
    """The slim model before anything is cut: its sizes and costs are known, its weights dense.

    Raises:
        PlanError: the plan was made for another model.
    """
    return _UNCUT[program.format](program, plan)


def _apply_onnx(
    program: OnnxProgram, plan: Plan, *, consume: bool, folder: Path | None
) -> SlimOnnx:
    del consume, folder
    return SlimOnnx(program, plan)


def _uncut_torch(program: Program, plan: Plan) -> Slim:
    return Slim(program, plan, plan.bind(program))


_APPLY: Mapping[GraphFormat, Callable[..., Slim | SlimOnnx]] = {
    "torch": torch_slim.apply,
    "onnx": _apply_onnx,
}
_UNCUT: Mapping[GraphFormat, Callable[[Any, Plan], Slim | SlimOnnx]] = {
    "torch": _uncut_torch,
    "onnx": SlimOnnx,
}
