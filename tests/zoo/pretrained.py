"""What a zoo entry from transformers is, and how it is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import graphprune as gp
from graphprune.frontends.hf.load import trace_model
from graphprune.ir.torch.program import Program

HEAD_DIMS = ("qk_dim", "v_dim")
"""What most classes can only have smaller together: they have one head size."""


@dataclass(frozen=True)
class Pretrained:
    """A model with what is known about it.

    Attributes:
        build: makes the module, weights at random.
        roles: role to the sizes of its prunable structures, in the order of the parameters.
        fraction: part of all parameters that some plan removes.
        frozen: what can't be pruned beside vocabularies, positions and the ends of the model:
            glob of parameter and dimension to words of the reason.
        beyond: roles that the source's class can't have smaller while all else stays.
        same_class: whether it can have all of them smaller together.
        inputs: (args, kwargs) of a module that is no transformers model.
    """

    build: Callable[[], nn.Module]
    roles: Mapping[str, tuple[int, ...]]
    fraction: float
    frozen: Mapping[str, str] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()
    same_class: bool = True
    inputs: Callable[[], tuple[Any, ...]] | None = None

    def trace(self) -> Program:
        """The traced program."""
        module = randomised(self.build())
        if self.inputs is not None:
            return gp.trace(module, self.inputs())
        return trace_model(module)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Everything that a checkpoint holds away from its initial value; scales near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1 and not name.endswith("original0"):
                tensor.copy_(values / tensor[0].numel() ** 0.5)
            elif name.endswith(("var", "original0")):
                tensor.copy_(values.abs() + 0.5)
            else:
                tensor.add_(0.3 * values)
    return module.eval()
