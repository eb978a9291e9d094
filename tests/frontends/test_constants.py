"""Constants have values, which graphs ask for: by numbers, sizes and checks that depend on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from zoo.case import check, randomise

X = (4, 6, 5)


class Grid(nn.Module):
    """Two linear layers over places whose grid a constant tells."""

    def __init__(self, function, stored):
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
        self.function = function
        if stored == "buffer":
            self.register_buffer("grid", torch.tensor([[2, 3]]))
        elif stored == "attribute":
            self.grid = torch.tensor([[2, 3]])
        else:
            self.grid = None

    def forward(self, x):
        grid = torch.tensor([[2, 3]]) if self.grid is None else self.grid
        return self.two(self.function(F.relu(self.one(x)), grid))


def checked(y, grid):
    torch._check((grid[:, 0] * grid[:, 1]).sum().item() == y.shape[1])
    return y


def folded(y, grid):
    height, width = grid[0].tolist()
    return y.unflatten(1, (height, width)).sum(1)


def counted(y, grid):
    return y + torch.nonzero(grid[0] > 2).sum()


def masked(y, grid):
    return y * grid[grid > 2].sum()


def repeated(y, grid):
    return y + torch.repeat_interleave(grid[0].float(), grid[0]).sum()


def repeated_places(y, grid):
    return y[:, :2].repeat_interleave(grid[0], 1)


def cut(y, grid):
    return torch.tensor_split(y, grid[0].cpu(), 1)[0] * 2


def by_number(y, grid):
    return y * grid.float().mean().item()


FUNCTIONS = [checked, folded, counted, masked, repeated, repeated_places, cut, by_number]


@pytest.mark.parametrize("stored", ["buffer", "attribute", "literal"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_of_constants(function, stored, tmp_path):
    module, x = randomise(Grid(function, stored)), torch.randn(X)
    program = gp.trace(module, (x,))
    slim = check(program, {"ffn": 0.5})
    kept = slim.plan.kept(program)["one.weight"][0]
    narrow = F.relu(F.linear(x, module.one.weight[kept], module.one.bias[kept]))
    made = function(narrow, torch.tensor([[2, 3]]))
    wanted = F.linear(made, module.two.weight[:, kept], module.two.bias)
    torch.testing.assert_close(slim.exported.module()(x), wanted)
    slim.save(tmp_path / "slim.pt2", "pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "slim.pt2").module()(x), wanted)


@pytest.mark.parametrize("function", [
    lambda y, grid: y * y.sum().item(),
    lambda y, grid: y + torch.nonzero(y > 0).shape[0],
], ids=["item", "nonzero"])  # fmt: skip
def test_values_of_inputs_are_not_known(function):
    module, x = randomise(Grid(function, "buffer")), torch.randn(X)
    program = gp.trace(module, (x,))
    if any(s.prunable for s in program.structures):
        check(program, {"*": 0.5})


def test_a_pruned_constant_has_its_slim_value():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("scale", torch.zeros(8))

        def forward(self, x):
            total = self.scale.sum().item()
            return self.two(F.relu(self.one(x)) * self.scale) * total

    module, x = randomise(Scaled()), torch.randn(4, 5)
    program = gp.trace(module, (x,))
    slim = check(program, {"ffn": 0.5})
    kept = slim.plan.kept(program)["one.weight"][0]
    scale = module.scale[kept]
    narrow = F.relu(F.linear(x, module.one.weight[kept], module.one.bias[kept])) * scale
    wanted = F.linear(narrow, module.two.weight[:, kept], module.two.bias) * scale.sum()
    torch.testing.assert_close(slim.exported.module()(x), wanted)
