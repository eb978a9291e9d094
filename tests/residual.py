"""A net of two residual blocks, and what its layers read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two residual blocks of two linear layers on six numbers."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.ins = nn.ModuleList(nn.Linear(6, inner) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(inner, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ins, self.outs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def reads(module: nn.Module, name: str, samples: list[Tensor]) -> Tensor:
    """What a layer reads, [tokens, in] in float64."""
    seen: list[Tensor] = []
    hook = module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().double().flatten(0, -2))
    )
    with torch.no_grad():
        for x in samples:
            module(x)
    hook.remove()
    return torch.cat(seen)
