"""Wanda, RIA and DSnoT against their formulas in numpy."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from graphprune.errors import RecipeError
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, Given, Norms, Unstructured
from graphprune.solvers.permute import assign, deal, exchange
from solvers.oracle import layer, rows_smallest, smallest


def test_wanda() -> None:
    weight, statistic, x = layer(20, 37)
    scores = np.abs(weight.numpy()) * np.linalg.norm(x.numpy(), axis=0)
    for sparsity in (0.1, 0.5, 0.9):
        count = round(sparsity * 37)
        solved = Wanda().solve(weight, statistic, Unstructured(sparsity))
        assert (solved.mask.numpy() == ~rows_smallest(scores, count)).all()
        assert (solved.weight.numpy() == np.where(solved.mask, weight, 0)).all()
        flat = Wanda(group="layer").solve(weight, statistic, Unstructured(sparsity))
        assert (flat.mask.numpy() == ~smallest(scores, round(sparsity * 740))).all()
    groups = Wanda().solve(weight, statistic, NM(1, 4))
    wanted = ~rows_smallest(scores[:, :36].reshape(-1, 4), 3).reshape(20, 36)
    assert (groups.mask.numpy()[:, :36] == wanted).all()
    assert groups.mask[:, 36].all()


def test_norms_are_enough_for_wanda() -> None:
    weight, statistic, x = layer(8, 16)
    norms = Norms(16)
    norms.add(x)
    for solver in (Wanda(), RIA(), DSnoT()):
        one = solver.solve(weight, norms, Unstructured(0.5))
        assert torch.equal(one.mask, solver.solve(weight, statistic, Unstructured(0.5)).mask)
        assert one.error is None


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_cumulative_wanda(sparsity: float) -> None:
    weight, statistic, x = layer(40, 100)
    scores = np.abs(weight.numpy()) * np.linalg.norm(x.numpy(), axis=0)
    solved = Wanda(cumulative=True).solve(weight, statistic, Unstructured(sparsity))
    assert abs(solved.sparsity - sparsity) <= 1e-3
    # One share of the sum for all rows: what goes is at most that, and one more would exceed it.
    gone = ~solved.mask.numpy()
    total = scores.sum(1)
    least = (scores * gone).sum(1) / total
    following = np.where(gone, np.inf, scores).min(1)
    assert least.max() <= (least + following / total).min() + 1e-12
    assert (np.where(gone, scores, 0).max(1) <= following).all()
    assert len(set(gone.sum(1))) > 1
    with_zeros = solved.weight
    again = Wanda(cumulative=True).solve(with_zeros, statistic, Unstructured(sparsity, True))
    assert not (again.mask & ~solved.mask).any()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ria(power: float) -> None:
    weight, statistic, x = layer(12, 20)
    weight[3] = 0  # a row without a sum
    size = np.abs(weight.numpy())
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(size / size.sum(1, keepdims=True)) + size / size.sum(0)
    scores = shares * np.linalg.norm(x.numpy(), axis=0) ** power
    flat = RIA(power).solve(weight, statistic, Unstructured(0.5))
    assert (flat.mask.numpy() == ~smallest(scores, 120)).all()
    rows = RIA(power, group="row").solve(weight, statistic, Unstructured(0.3))
    assert (rows.mask.numpy() == ~rows_smallest(scores, 6)).all()
    groups = RIA(power).solve(weight, statistic, NM(2, 4))
    assert (groups.mask.numpy() == ~rows_smallest(scores.reshape(-1, 4), 2).reshape(12, 20)).all()


def test_permuted_groups_keep_more() -> None:
    weight, statistic, x = layer(16, 26)
    plain = RIA().solve(weight, statistic, NM(2, 4))
    solved = RIA(permute=True).solve(weight, statistic, NM(2, 4))
    order = solved.permutation
    assert order is not None
    assert sorted(order.tolist()) == list(range(26))
    assert order[24:].tolist() == [24, 25]
    assert (solved.mask[:, order[:24]].reshape(-1, 4).sum(1) == 2).all()
    size = np.abs(weight.numpy())
    scores = (size / size.sum(1, keepdims=True) + size / size.sum(0)) * np.sqrt(
        np.linalg.norm(x.numpy(), axis=0)
    )
    assert (scores * solved.mask.numpy()).sum() > 1.01 * (scores * plain.mask.numpy()).sum()
    assert plain.permutation is None


def test_dealing_spreads_importance() -> None:
    scores = torch.arange(8.0)[torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])][None]
    assert scores[0][deal(scores, 4)].tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_exchange_is_optimal_for_each_place() -> None:
    scores = torch.rand(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def kept(order) -> float:
        return float(scores[:, order[:9]].reshape(5, 3, 3).topk(1, 2).values.sum())

    start = torch.arange(10)
    best = start
    for place in range(3):  # the oracle tries every assignment of the place's columns
        columns = best[place:9:3]
        options = []
        for p in permutations(range(3)):
            option = best.clone()
            option[place:9:3] = columns[list(p)]
            options.append(option)
        best = max(options, key=kept)
    assert kept(exchange(scores, start, 1, 3)) == pytest.approx(kept(best))
    assert exchange(scores, start, 1, 3)[9] == 9


def test_assignment_is_cheapest() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 6):
        for cost in (rng.normal(size=(size, size)), rng.integers(0, 3, (size, size)).astype(float)):
            taken = assign(cost).numpy()
            assert sorted(taken) == list(range(size))
            least = min(cost[range(size), p].sum() for p in permutations(range(size)))
            assert cost[range(size), taken].sum() == pytest.approx(least)


def slow_dsnot(w, mean, var, norms, kept, cycles, limit, m) -> np.ndarray:
    kept = kept.copy()
    for row in range(len(w)):
        share = w[row] * mean
        grown, gone = set(), set()
        e = share[~kept[row]].sum()
        for _ in range(cycles):
            if abs(e) <= limit:
                break
            out = [j for j in range(w.shape[1]) if not kept[row, j] and j not in gone]
            grow = max(out, key=lambda j: share[j] * np.sign(e) / var[j], default=None)
            if grow is None or share[grow] * np.sign(e) <= 0:
                break
            inside = [j for j in range(w.shape[1]) if kept[row, j] and j not in grown]
            if m:
                inside = [j for j in inside if j // m == grow // m]
            else:
                inside = [j for j in inside if share[j] * np.sign(e) < 0]
            if not inside:
                break
            go = min(inside, key=lambda j: abs(w[row, j]) * norms[j])
            after = e - share[grow] + share[go]
            if abs(after) >= abs(e):
                break
            e = after
            kept[row, grow], kept[row, go] = True, False
            grown.add(grow)
            gone.add(go)
        assert abs(e) == pytest.approx(abs(share[~kept[row]].sum()))
    return kept


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(3, 8)])
@pytest.mark.parametrize("threshold", [0.0, 400.0])
def test_dsnot(pattern, threshold: float) -> None:
    weight, statistic, x = layer(24, 48)
    first = Wanda().solve(weight, statistic, pattern).mask
    solved = DSnoT(threshold=threshold).solve(weight, statistic, pattern)
    wide = x.numpy()
    m = pattern.m if isinstance(pattern, NM) else 0
    wanted = slow_dsnot(
        weight.numpy(), wide.mean(0), wide.var(0), np.sqrt((wide**2).mean(0)), first.numpy(), 50,
        threshold / 2048, m,
    )  # fmt: skip
    assert (solved.mask.numpy() == wanted).all()
    assert not torch.equal(solved.mask, first)
    assert torch.equal(solved.mask.sum(1), first.sum(1))
    if m:
        assert (solved.mask.reshape(-1, m).sum(1) == pattern.n).all()
    shift = [np.abs((weight.numpy() * ~k.numpy()) @ wide.mean(0)) for k in (first, solved.mask)]
    assert (shift[1] <= shift[0] + 1e-12).all()
    assert shift[1].sum() < shift[0].sum() * (0.99 if threshold else 0.8)


def test_dsnot_starts_where_it_is_told() -> None:
    weight, statistic, _ = layer(8, 24)
    given = SparseGPT().solve(weight, statistic, Unstructured(0.5))
    by_mask = DSnoT().solve(weight, statistic, Unstructured(0.5), given.mask)
    by_solver = DSnoT(first=SparseGPT()).solve(weight, statistic, Unstructured(0.5))
    pattern = DSnoT(first=Wanda()).solve(weight, statistic, Given(given.mask))
    assert torch.equal(by_mask.mask, by_solver.mask)
    assert torch.equal(by_mask.mask, pattern.mask)
    still = DSnoT(cycles=0).solve(weight, statistic, Unstructured(0.5), given.mask)
    assert torch.equal(still.mask, given.mask)


def test_options_out_of_range() -> None:
    with pytest.raises(RecipeError):
        RIA(power=-1)
    with pytest.raises(RecipeError):
        DSnoT(cycles=-1)
