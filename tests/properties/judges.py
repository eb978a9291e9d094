"""Judges of a slim model that know nothing of the masked model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphprune as gp
from graphprune.ir.torch.interpreter import run_graph
from graphprune.ir.torch.program import Program
from properties.recipe import Recipe

Shapes = Sequence[tuple[int, ...]]

SCALES = (0.01, 1.0, 100.0)
TOLERANCE = 1e-8

# Zero wherever all that they read of a coordinate is zero. What makes a new axis, as `repeat`
# does, isn't: its copies are there however much of it is removed.
_PLAIN = frozenset(
    "param buffer shrunk linear reuse tied embedding conv conv_transpose bilinear layers matmul "
    "einsum reshape flatten unflatten permute transpose unsqueeze squeeze cat stack split chunk "
    "unbind get slice select take flip roll pixel_shuffle pixel_unshuffle batch_norm linear_by "
    "two_sided lora".split()
)
_PLAIN_UNARY = frozenset(
    "relu gelu silu tanh neg abs square half contiguous positive clamp".split()
)
_PLAIN_SPELLINGS = frozenset(
    ["multiply", "divide", "true_divide", "negative", "absolute", "fix", "greater", "arcsinh",
     "arctan", "moveaxis one way", "swapdims", "hsplit", "hsplit at", "dsplit", "vecdot", "unfold",
     "overlapping unfold", "unfold of rows", "ravel", "multi_dot", "hardshrink", "mish", "celu",
     "tanhshrink", "frac", "real part", "turned"]
)  # fmt: skip


# What isn't zero where removed coordinates of another axis are, and what adds up over an axis
# without a weight that has zeros there. A plain recipe has either of them.
_SHIFTS = frozenset("conv conv_transpose reuse layers batch_norm two_sided".split())
_SUMS = frozenset("matmul einsum reduce linear_by vecdot multi_dot".split())


def shifts(step: tuple[Any, ...]) -> bool:
    """Whether an instruction adds a bias."""
    return step[0] in _SHIFTS or (step[0] == "linear" and step[-1] is True)


def sums(step: tuple[Any, ...]) -> bool:
    """Whether an instruction adds values up."""
    return step[0] in _SUMS or (step[0] == "spelled" and step[-1] in _SUMS | {"overlapping unfold"})


def is_plain(step: tuple[Any, ...], shapes: Shapes) -> bool:
    """Whether an instruction doesn't notice that removed coordinates are zero instead of absent.

    Args:
        step: the instruction.
        shapes: those of its operands. Where they differ, a sum isn't zero where one of them is.
    """
    name, _, *constants = step
    match name:
        case "layers":
            return all(is_plain(s, [(0,), (0,)]) for block in constants for s in block)
        case "unary":
            return constants[0] in _PLAIN_UNARY
        case "spelled":
            return constants[0] in _PLAIN_SPELLINGS
        case "reduce":
            return constants[0] == "sum"
        case "binary":
            return constants[0] == "mul" or (
                constants[0] in ("add", "sub", "maximum") and shapes[0] == shapes[1]
            )
        case "pad":
            return constants[1:] == ["constant", 0.0]
    return name in _PLAIN


def judge_zeroed(recipe: Recipe, program: Program, plan: gp.Plan, slim: gp.Slim) -> bool:
    """Compare the slim graph with the module that users wrote, its removed weights set to zero.

    Returns:
        Whether it could be: nothing in the recipe notices zeros.
    """
    shapes = _operand_shapes(recipe)
    if not all(is_plain(s, sizes) for s, sizes in zip(recipe.steps, shapes, strict=True)):
        return False
    if any(map(shifts, recipe.steps)) and any(map(sums, recipe.steps)):
        return False
    module = recipe.build().double()
    state = dict(module.named_parameters(remove_duplicate=False))
    state |= dict(module.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, kept in plan.kept(program).items():
            if name in state and state[name].is_floating_point():
                stays = torch.zeros(state[name].shape, dtype=torch.bool)
                stays[np.ix_(*kept)] = True
                state[name].masked_fill_(~stays, 0)
    inputs = _wide(recipe.example(seed=3))
    _agree("the module with zeros", _run(module, inputs), _graph(slim, inputs))
    return True


def judge_module(recipe: Recipe, slim: gp.Slim) -> bool:
    """Compare `slim.module` with the slim graph, for inputs of several scales.

    Returns:
        Whether it could be: it has the class of the source, and works in float64.
    """
    if any(step[-1] in ("bits", "float") for step in recipe.steps):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = slim.module
    if type(module) is not type(slim.program.module):
        return False
    module = module.double()
    for scale in SCALES:
        inputs = _wide(recipe.example(seed=4, scale=recipe.scale * scale))
        expected = _graph(slim, inputs)
        if all(x.isfinite().all() for x in expected):
            _agree(f"slim.module at {scale} of the scale", expected, _run(module, inputs))
    return True


def _operand_shapes(recipe: Recipe) -> list[Shapes]:
    net = recipe.build()
    values: list[Any] = list(recipe.example())
    found: list[Shapes] = []
    with torch.no_grad():
        for i, step in enumerate(recipe.steps):
            operands = (values[v] for v in step[1])
            found.append([tuple(v.shape) if isinstance(v, Tensor) else () for v in operands])
            values.append(net.compute(i, step, values))  # type: ignore[operator]
    return found


def _wide(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def _graph(slim: gp.Slim, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return run_graph(slim.exported, slim.weights, (inputs, {}), aliases=slim.aliases)


def _run(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what a module makes on its way
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return list(module(*inputs))
    finally:
        torch.set_default_dtype(before)


def _agree(what: str, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for i, (e, f) in enumerate(zip(expected, found, strict=True)):
        assert e.shape == f.shape, f"output {i}: {what} has {e.shape}, the graph {f.shape}"
        error = float((e - f).abs().max()) if e.numel() else 0.0
        scale = max(float(e.abs().max()), 1e-12) if e.numel() else 1.0
        assert error <= TOLERANCE * scale, f"output {i}: {what} is off by {error / scale:.2g}"
