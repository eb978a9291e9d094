"""What a zoo entry is, and the checks that every one of them goes through."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphprune as gp
from graphprune.axes import atoms, mask
from graphprune.ir.torch.interpreter import run_graph
from graphprune.ir.torch.program import Program

EXACT = 1e-9
ROUNDING = 5e-5  # of float32, relative to the largest output
SCALES = (0.01, 1.0, 100.0)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Case:
    """A model with what is known about it.

    Attributes:
        build: makes the module.
        inputs: shapes of the floating inputs, or a function that gives the inputs.
        roles: role to the sizes of its prunable structures, in the order of the parameters.
        fraction: part of all parameters that some plan removes.
        frozen: what can't be pruned beside the model's inputs and outputs and convolution
            kernels: "parameter:dimension" to the reason.
        same_class: whether the slim model has a module of the source's class. Where the source
            writes sizes into `forward`, or its class can't have them, it is the exported graph.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] | Callable[[], tuple[Any, ...]]
    roles: Mapping[str, tuple[int, ...]]
    fraction: float
    frozen: Mapping[str, str] = field(default_factory=dict)
    same_class: bool = True

    def trace(self) -> Program:
        """The traced program, with random weights and statistics."""
        generator = torch.Generator().manual_seed(1)
        if callable(self.inputs):
            args = self.inputs()
        else:
            args = tuple(torch.randn(s, generator=generator) for s in self.inputs)
        return gp.trace(randomise(self.build()), args)


def randomise(module: M, seed: int = 0) -> M:
    """Every parameter and buffer away from its initial value, scales and variances positive."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 16
            values = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
            positive = name.endswith(("var", "original0", "weight_g"))
            scale = tensor.dim() == 1 and name.endswith("weight")
            if positive:
                values = values.abs() + 0.5
            tensor.copy_(values + 1 if scale else values)
    return module.eval()


def prunable_sizes(program: Program) -> dict[str, tuple[int, ...]]:
    """Role to the sizes of its prunable structures."""
    found: dict[str, list[int]] = {}
    for s in program.structures:
        if s.prunable and s.size > 1:
            found.setdefault(s.role, []).append(s.size)
    return {role: tuple(sizes) for role, sizes in found.items()}


def prunable_fraction(program: Program) -> float:
    """Part of the trainable parameters that can leave: those with a prunable unit in any place."""
    total = fixed = 0
    for name in program.trainable:
        dims = program.typing.parameters[name]
        total += int(np.prod([d.size for d in dims]))
        gone = {a: np.zeros(a.size, dtype=bool) for d in dims for a in atoms(d) if not a.frozen}
        fixed += int(np.prod([mask(d, gone).sum() for d in dims]))
    return 1 - fixed / total


def frozen_reasons(program: Program) -> dict[str, str]:
    """Why trainable dimensions are frozen, but for the ends of the model and kernels."""
    return {
        f"{name}:{dim}": reason
        for (name, dim), reason in program.frozen().items()
        if name in program.trainable
        and not reason.startswith(("an axis of size 1", "a dimension of a model", "a convolution"))
    }


def check(program: Program, remove: Mapping[str, float], tolerance: float = EXACT) -> gp.Slim:
    """Prune at random, and let the oracle judge."""
    plan = gp.select(program, remove=remove, score="random", seed=3)
    assert plan.kept_units, "nothing was removed"
    slim = gp.apply(program, plan)
    certificate = gp.verify(program, plan, slim, dtype=torch.float64, tolerance=tolerance)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0, "the inputs show no effect of pruning"
    return slim


def check_module(slim: gp.Slim, *, same_class: bool) -> None:
    """The slim module computes what the slim program computes, and is of the class expected.

    In float64, on the example at three scales: what a factor does to a softmax, or an epsilon to a
    norm, may show at one of them only. A module that is the graph names the dtypes of its trace.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the slim module is the exported graph")
        module = slim.module
    assert (type(module) is type(slim.program.module)) is same_class
    args, kwargs = slim.program.example
    with torch.no_grad():
        module(*args, **kwargs)  # runs as it is, too
        if same_class:
            module = copy.deepcopy(module).double()
        for scale in SCALES:
            args, kwargs = inputs = scaled(slim.program.example, scale)
            if not same_class:
                args, kwargs = in_dtype(inputs, torch.float32)
            leaves = pytree.tree_leaves(module(*args, **kwargs))
            wanted = run_graph(slim.exported, slim.weights, inputs, aliases=slim.aliases)
            for a, b in zip(leaves, wanted, strict=True):
                if isinstance(b, torch.Tensor) and b.is_floating_point():
                    allowed = (EXACT if same_class else ROUNDING) * float(b.abs().max())
                    torch.testing.assert_close(a.double(), b, rtol=0.0, atol=allowed)
                else:
                    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def scaled(example: Any, scale: float) -> Any:
    """Example inputs in float64, floating ones times `scale`."""
    wide = in_dtype(example, torch.float64)
    return pytree.tree_map_only(
        torch.Tensor, lambda x: x * scale if x.is_floating_point() else x, wide
    )


def in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """Inputs, floating ones in `dtype`."""
    return pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs
    )
