"""Running a model's own code in another dtype, without touching torch's default."""

from __future__ import annotations

import torch
from torch import nn

from graphprune.rewrite.module.exactly import Exactly
from graphprune.rewrite.module.reload import Widened, run_widened


class Numbers(nn.Module):
    """Floating numbers of every origin: none of them names its dtype."""

    def forward(self, ids):
        chosen = torch.where(ids > 3, 0.1, 1.7) + ids / 7 + torch.arange(5) * 0.3 + (ids < 2) * 0.7
        made = torch.full((5,), 0.1) + torch.linspace(0, 1, 5) + torch.eye(5)[0] + torch.rsqrt(ids)
        drawn = torch.rand(5) + torch.randn(5) + torch.randint(0, 9, (5,)) + torch.randperm(5)
        return chosen, made, drawn, torch.randint(0, 9, (3,)), ids.float().mean(), ids.sum()


def test_as_if_the_default_were_another():
    """The oracle changes torch's default dtype, which nothing else in this process may see."""
    inputs = ((torch.arange(10).view(2, 5),), {})
    torch.manual_seed(0)
    found = run_widened(Numbers(), inputs, Exactly(torch.float64))
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        wanted = run_widened(Numbers(), inputs, Widened(torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
