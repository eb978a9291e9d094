"""What a zoo entry is, and the checks that every one of them goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import graphprune as gp
from graphprune.axes import atoms, mask
from graphprune.program import Program

EXACT = 1e-9


@dataclass(frozen=True)
class Case:
    """A model with what is known about it.

    Attributes:
        name: for the test's id.
        build: makes the module.
        shapes: of the floating inputs.
        roles: role to the sizes of its prunable structures, in the order of the parameters.
        fraction: part of all parameters that some plan removes.
        frozen: parameter and dimension to words that its reason has to contain.
        args: the inputs themselves where they aren't all floating.
        kwargs: keyword inputs.
        tolerance: of verification.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    roles: Mapping[str, tuple[int, ...]]
    fraction: float
    frozen: Mapping[tuple[str, int], str] = field(default_factory=dict)
    args: Callable[[], tuple[Any, ...]] | None = None
    kwargs: Callable[[], dict[str, Any]] | None = None
    tolerance: float = EXACT

    def trace(self) -> Program:
        """The traced program, random weights and statistics."""
        module = randomise(self.build())
        generator = torch.Generator().manual_seed(1)
        args = tuple(torch.randn(s, generator=generator) for s in self.shapes)
        if self.args is not None:
            args = self.args()
        return gp.trace(module, args, self.kwargs() if self.kwargs else None)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
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


def check(program: Program, remove: Mapping[str, float], tolerance: float = EXACT) -> gp.Slim:
    """Prune at random, and let the oracle judge."""
    plan = gp.select(program, remove=remove, score="random", seed=3)
    assert plan.kept_units, "nothing was removed"
    slim = gp.apply(program, plan)
    certificate = gp.verify(program, plan, slim, dtype=torch.float64, tolerance=tolerance)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0, "the inputs show no effect of pruning"
    return slim
