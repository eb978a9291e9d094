"""Structured optimal brain surgery against enumeration in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from graphprune.errors import CalibrationError
from graphprune.solvers.obs import Descent, Fit, Problem, Surgeon


def made(seed: int, out: int, units: list[int]) -> Problem:
    """A layer with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    n = len(units)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, n, generator=generator, dtype=torch.float64)
    return Problem(weight, x.T @ x / len(x), np.array(units))


def error(problem: Problem, kept: list[int]) -> float:
    """The least squared error on some columns, by a least-squares solver on a square root of H."""
    root = torch.linalg.cholesky(problem.hessian).T  # H = rootᵀ root
    wanted = root @ problem.weight.T
    fitted = torch.linalg.lstsq(root[:, kept], wanted).solution
    return float((root[:, kept] @ fitted - wanted).square().sum())


def columns(problem: Problem, units: tuple[int, ...]) -> list[int]:
    return [i for i, u in enumerate(problem.units) if u == -1 or u in units]


@pytest.mark.parametrize("units", [list(range(9)), [0, 0, 1, 1, 2, 2, 3, 3, -1], [0, 1, 1, 2, -1]])
def test_loss_is_that_of_the_least_squares_fit(units: list[int]) -> None:
    problem = made(0, 5, units)
    for kept in ((0, 2), (1,), tuple(range(max(units) + 1))):
        wanted = error(problem, columns(problem, kept))
        assert problem.loss(kept) == pytest.approx(wanted, rel=1e-8, abs=1e-9 * problem.energy)


@pytest.mark.parametrize("units", [list(range(8)), [0, 0, 1, 1, 2, 2, 3, 3, -1], [0, 1, 1, 2, 3]])
def test_costs_and_gains_are_differences_of_losses(units: list[int]) -> None:
    problem = made(1, 4, units)
    everything = np.arange(max(units) + 1)
    whole = problem.loss(everything.tolist())
    dearer = [
        problem.loss([u for u in everything.tolist() if u != gone]) - whole
        for gone in everything.tolist()
    ]
    assert Descent([problem]).scores(everything) == pytest.approx(dearer, rel=1e-7)
    assert Fit(problem, everything.tolist()).costs(everything) == pytest.approx(dearer, rel=1e-7)
    some = [0, 1]
    fit = Fit(problem, some)
    others = np.array([u for u in everything if u not in some])
    cheaper = [fit.loss - problem.loss([*some, int(u)]) for u in others]
    assert fit.gains(others) == pytest.approx(cheaper, rel=1e-7)


def test_removals_are_those_of_one_after_another() -> None:
    problem = made(2, 4, list(range(12)))
    order, costs = Surgeon(steps=100).order([problem], 12)
    left = list(range(12))
    loss = 0.0
    for unit, cost in zip(order.tolist(), costs.tolist(), strict=True):
        rises = {u: problem.loss([v for v in left if v != u]) - loss for u in left if len(left) > 1}
        if rises:
            assert unit == min(rises, key=lambda u: rises[u])
            assert cost == pytest.approx(rises[unit], rel=1e-6)
            loss += rises[unit]
            left.remove(unit)
    assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize("seed", range(4))
def test_no_single_exchange_is_better(seed: int) -> None:
    problem = made(seed, 6, list(range(14)))
    best = min(problem.loss(c) for c in itertools.combinations(range(14), 7))
    kept = Surgeon(rounds=200).choose([problem], 14, 7)
    assert kept.shape == (1, 7)
    found = problem.loss(kept[0].tolist())
    greedy = problem.loss(Surgeon(rounds=0).choose([problem], 14, 7)[0].tolist())
    assert best * (1 - 1e-9) <= found <= greedy
    units = kept[0].tolist()
    for gone in units:
        for new in set(range(14)) - set(units):
            assert found <= problem.loss([*(u for u in units if u != gone), new]) * (1 + 1e-8)


def test_few_choices_are_all_tried() -> None:
    problem = made(5, 3, [0, 0, 1, 1, 2, 2, -1])
    best = min(itertools.combinations(range(3), 2), key=problem.loss)
    assert Surgeon().choose([problem], 3, 2)[0].tolist() == list(best)


def test_layers_that_read_the_same_units_are_weighed_together() -> None:
    problems = [made(6, 3, list(range(5))), made(7, 4, [4, 3, 2, 1, 0])]
    best = min(itertools.combinations(range(5), 3), key=lambda c: sum(p.loss(c) for p in problems))
    assert Surgeon().choose(problems, 5, 3)[0].tolist() == list(best)


def test_every_outer_unit_keeps_its_own() -> None:
    problem = made(8, 4, list(range(12)))
    kept = Surgeon(rounds=200).choose([problem], 4, 2, outer=3)
    assert kept.shape == (3, 2)
    assert (kept // 4 == np.arange(3)[:, None]).all()
    found = problem.loss(kept.ravel().tolist())
    units = kept.ravel().tolist()
    for gone in units:
        for new in set(range(gone // 4 * 4, gone // 4 * 4 + 4)) - set(units):
            others = [u for u in units if u != gone]
            assert found <= problem.loss([*others, new]) * (1 + 1e-8)


def test_everything_stays_and_nothing_is_refused() -> None:
    problem = made(9, 2, list(range(4)))
    assert Surgeon().choose([problem], 4, 4)[0].tolist() == [0, 1, 2, 3]
    for wrong in (0, 5):
        with pytest.raises(CalibrationError, match="can't stay"):
            Surgeon().choose([problem], 4, wrong)
