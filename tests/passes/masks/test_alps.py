"""ALPS: never worse than SparseGPT, and exact on a given mask."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from graphprune.errors import RecipeError
from graphprune.passes.masks import alps
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, Given, Unstructured
from solvers.oracle import damped, layer, lost, moment


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.3), Unstructured(0.6), Unstructured(0.9), NM(2, 4), NM(1, 4)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 64), (48, 32), (96, 160)])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_sparsegpt(pattern, shape: tuple[int, int], seed: int) -> None:
    weight, statistic, x = layer(*shape, seed=seed)
    greedy = SparseGPT().solve(weight, statistic, pattern)
    solved = ALPS().solve(weight, statistic, pattern)
    assert int(solved.mask.sum()) == int(greedy.mask.sum())
    assert objective(x, weight, solved) <= objective(x, weight, greedy)
    assert lost(solved) <= lost(greedy) * 1.001


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_given_mask_is_solved_by_least_squares(dtype: torch.dtype) -> None:
    weight, statistic, x = layer(12, 24, dtype=dtype)
    kept = torch.rand(12, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[5] = False
    solved = ALPS(refits=24, tolerance=1e-12).solve(weight, statistic, Given(kept))
    hessian = damped(x)
    for row in range(12):
        at = kept[row].numpy()
        wanted = np.linalg.solve(
            hessian[np.ix_(at, at)], hessian[at] @ weight[row].double().numpy()
        )
        found = solved.weight[row].double().numpy()
        np.testing.assert_allclose(found[at], wanted, atol=1e-8 if dtype == torch.float64 else 1e-3)
        assert (found[~at] == 0).all()


def objective(x, weight, solved) -> float:
    change = (weight - solved.weight).numpy()
    return float(np.trace(change @ damped(x) @ change.T))


def test_more_refits_never_hurt() -> None:
    weight, statistic, x = layer(32, 64)
    greedy = SparseGPT().solve(weight, statistic, Unstructured(0.7))
    errors = [
        objective(
            x, weight, ALPS(refits=r, tolerance=1e-9).solve(weight, statistic, Given(greedy.mask))
        )
        for r in (0, 1, 3, 10, 40)
    ]
    assert all(a > b for a, b in pairwise(errors))
    assert errors[-1] < objective(x, weight, greedy)


@pytest.mark.parametrize("shape", [(560, 512), (512, 560)])
def test_thresholds_from_a_sample_cost_nothing(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistic, x = layer(*shape, tokens=1024, dtype=torch.float32)
    pattern = Unstructured(0.6)
    solved = ALPS().solve(weight, statistic, pattern)
    assert int((~solved.mask).sum()) == pattern.count(weight.numel())
    assert weight.numel() > 4 * alps.SAMPLED  # smaller ones are sorted whole
    monkeypatch.setattr(alps, "SAMPLED", weight.numel())
    every = ALPS().solve(weight, statistic, pattern)
    assert not torch.equal(solved.mask, every.mask)
    assert objective(x, weight, solved) < 1.002 * objective(x, weight, every)


def test_twice_the_same_bits() -> None:
    a, b = (
        ALPS().solve(*layer(24, 48, dtype=torch.float32)[:2], Unstructured(0.6)) for _ in range(2)
    )
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("rho", [0.1, 1e4])
def test_orthogonal_inputs_are_solved_exactly(rho: float) -> None:
    statistic = moment(torch.eye(16, dtype=torch.float64))
    weight = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solved = ALPS(rho=rho).solve(weight, statistic, Unstructured(0.5))
    wanted = weight * (weight.abs() >= weight.abs().flatten().sort().values[32])
    torch.testing.assert_close(solved.weight, wanted)


def test_a_penalty_that_holds_the_mask_is_lowered() -> None:
    weight, statistic, x = layer(48, 32)
    pattern = Unstructured(0.6)
    solved = ALPS(rho=1e4).solve(weight, statistic, pattern)
    assert not torch.equal(solved.mask, Wanda("layer").solve(weight, statistic, pattern).mask)
    greedy = SparseGPT().solve(weight, statistic, pattern)
    assert objective(x, weight, solved) < objective(x, weight, greedy)


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0},
        {"steps": 0},
        {"damping": 0},
        {"relaxation": 0},
        {"relaxation": 2},
        {"growth": ()},
        {"growth": ((0.1, 1.3), (0.05, 1.2))},
    ],
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(RecipeError):
        ALPS(**options)
