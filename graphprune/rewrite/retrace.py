"""Slim models as programs of their own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.errors import EmitError
from graphprune.exclusive import alone
from graphprune.frontends.hf.load import traceable
from graphprune.frontends.tracing.trace import assemble, trace
from graphprune.ir.torch.program import Program
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


@overload
def retrace(slim: Slim, dtype: torch.dtype | None = None) -> Program: ...
@overload
def retrace(slim: Slim | SlimOnnx, dtype: None = None) -> BaseProgram: ...
def retrace(slim: Slim | SlimOnnx, dtype: torch.dtype | None = None) -> BaseProgram:
    """The slim model as a program of its own.

    Args:
        slim: the slim model.
        dtype: of its weights and inputs, if they are to be others; not for ONNX.

    Raises:
        EmitError: another dtype, for a model that has no form but its graph.
    """
    return _RETRACE[slim.program.format](slim, dtype)


def _retrace_onnx(slim: SlimOnnx, dtype: None) -> BaseProgram:
    del dtype
    return slim.retraced()


def _retrace_torch(slim: Slim, dtype: torch.dtype | None) -> Program:
    args, kwargs = slim.program.example
    with alone(), warnings.catch_warnings():  # nobody asked for the module
        warnings.filterwarnings("ignore", message="the slim module is the exported graph")
        module = slim.module
    if not isinstance(module, type(slim.program.module)):  # it has no other form than its graph
        if dtype is not None:
            raise EmitError(
                f"the slim model can't be traced in {dtype}",
                where=type(slim.program.module).__name__,
                why="no sizes of the class compute what the slim graph computes",
                hint=f"load the source in {dtype}",
            )
        return assemble(slim.exported, None, slim.aliases, (args, kwargs))
    if dtype is not None:
        module = copy.deepcopy(module).to(dtype)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
        )
    guard: Any = nullcontext()
    if slim.program.source is not None:
        guard = traceable(module)
    with guard:
        return trace(module.eval(), args, kwargs)


_RETRACE: Mapping[GraphFormat, Callable[[Any, Any], BaseProgram]] = {
    "torch": _retrace_torch,
    "onnx": _retrace_onnx,
}
