"""Weights too large for the processor's cache are cut and summed piece by piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.rewrite import weights


class Mixing(nn.Module):
    """Weights of which two dimensions shrink, with and without one between that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.second = nn.Conv2d(12, 20, 3)
        self.third = nn.Conv1d(20, 8, 1, dtype=torch.float64)
        self.last = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu().flatten(2)
        y: torch.Tensor = self.last(self.third(x.double()).relu().transpose(1, 2))
        return y


@pytest.mark.parametrize("piece", [1, 40, 100, weights.PIECE])
@pytest.mark.parametrize("consume", [False, True])
def test_what_stays_is_what_the_plan_names(
    piece: int, consume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE", piece)
    torch.manual_seed(0)
    program = gp.trace(Mixing().eval(), (torch.rand(2, 3, 8, 8),))
    dense = {n: program.weights[n].detach().numpy().copy() for n in program.trainable}
    plan = gp.select(program, remove={"channels": 0.5}, score="random")
    kept = plan.kept(program)
    shrunk = [
        n
        for n in dense
        if sum(len(k) < s for k, s in zip(kept[n], dense[n].shape, strict=True)) > 1
    ]
    assert {"second.weight", "third.weight"} <= set(shrunk)
    slim = gp.apply(program, plan, consume=consume)
    for name, whole in dense.items():
        np.testing.assert_array_equal(slim.weights[name].numpy(), whole[np.ix_(*kept[name])])
        assert slim.weights[name].is_contiguous()


def test_magnitudes_of_weights_of_many_sizes_and_types() -> None:
    """Squares of all of them lie in the same memory, one after the other."""
    torch.manual_seed(0)
    program = gp.trace(Mixing().eval(), (torch.rand(2, 3, 8, 8),))
    plan = gp.select(program, remove={"channels": 0.5})
    kept = plan.kept(program)
    w = {n: program.weights[n].detach().double().numpy() for n in program.trainable}
    scores = {
        "first.weight": (w["first.weight"] ** 2).sum((1, 2, 3)) + w["first.bias"] ** 2
        + (w["second.weight"] ** 2).sum((0, 2, 3)),
        "second.weight": (w["second.weight"] ** 2).sum((1, 2, 3)) + w["second.bias"] ** 2
        + (w["third.weight"] ** 2).sum((0, 2)),
        "third.weight": (w["third.weight"] ** 2).sum((1, 2)) + w["third.bias"] ** 2
        + (w["last.weight"] ** 2).sum(0),
    }  # fmt: skip
    for name, score in scores.items():
        best = np.sort(np.argsort(score)[len(score) // 2 :])
        np.testing.assert_array_equal(kept[name][0], best)
