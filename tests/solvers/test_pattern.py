"""Masks: exact counts, ties by index, existing zeros, groups and their tails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from graphprune.errors import RecipeError
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.solvers import NM, Given, Unstructured
from graphprune.solvers.pattern import lowest
from solvers.oracle import rows_smallest


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_lowest_is_a_stable_sort(data) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    values = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 2.0])
    scores = data.draw(npst.arrays(np.float32, (rows, columns), elements=values))
    count = data.draw(st.integers(0, columns))
    found = lowest(torch.from_numpy(scores), count)
    assert (found.numpy() == rows_smallest(scores, count)).all()
    fixed = data.draw(npst.arrays(bool, (rows, columns)))
    found = lowest(torch.from_numpy(scores), count, torch.from_numpy(fixed))
    first = np.where(fixed, -np.inf, scores)
    assert (found.numpy() == (rows_smallest(first, count) | fixed)).all()


@pytest.mark.parametrize("kind", ["normal", "tied", "constant", "sorted", "two"])
@pytest.mark.parametrize("fraction", [1e-5, 0.003, 0.5, 0.7, 0.9999, 1.0])
def test_lowest_of_many(kind: str, fraction: float) -> None:
    """Enough values for the threshold to be bracketed by a sample."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 100_003, generator=g)
    if kind == "tied":
        scores = (scores * 4).round()
    elif kind == "constant":
        scores = torch.ones_like(scores)
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "two":
        scores = (scores > 0).float()
    count = round(fraction * scores.numel())
    found = lowest(scores, count)
    wanted = torch.zeros_like(found)
    wanted[0, scores[0].argsort(stable=True)[:count]] = True
    assert torch.equal(found, wanted)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.floats(0, 0.99), st.booleans())
def test_shares_of_blocks_add_up(rows, columns, step, sparsity, preserve) -> None:
    g = torch.Generator().manual_seed(rows * 100 + columns)
    weight = torch.randn(rows, columns, generator=g)
    weight *= torch.rand(rows, columns, generator=g) < 0.6
    pattern = Unstructured(sparsity, preserve)
    shares = pattern.shares(weight, range(0, columns, step))
    fixed = int((weight == 0).sum()) if preserve else 0
    assert sum(shares) == max(round(sparsity * (rows * columns)), fixed)
    for start, share in zip(range(0, columns, step), shares, strict=True):
        block = weight[:, start : start + step]
        assert (int((block == 0).sum()) if preserve else 0) <= share <= block.numel()


def test_the_layout_of_memory_does_not_matter() -> None:
    weight = torch.randn(40, 24).round()
    for pattern in (Unstructured(0.4), NM(2, 4), NM(5, 12)):
        one = Magnitude().solve(weight, None, pattern)
        two = Magnitude().solve(weight.T.contiguous().T, None, pattern)
        assert torch.equal(one.mask, two.mask)
        assert two.weight.is_contiguous()


def test_existing_zeros() -> None:
    weight = torch.arange(1.0, 17).reshape(2, 8)
    weight[1, 4:] = 0
    free = Magnitude().solve(weight, None, Unstructured(0.5))
    assert int((~free.mask).sum()) == 8
    fixed = Magnitude("row").solve(weight, None, Unstructured(0.25, preserve=True))
    assert (~fixed.mask).sum(1).tolist() == [2, 4]
    groups = Magnitude().solve(weight, None, NM(2, 4, preserve=True))
    assert groups.mask.reshape(-1, 4).sum(1).tolist() == [2, 2, 2, 0]
    tail = Magnitude().solve(weight, None, NM(1, 3, preserve=True))
    assert tail.mask[1].tolist() == [False, False, True, True] + [False] * 4


def test_pruning_twice_gives_the_same_mask() -> None:
    weight = torch.randn(16, 32)
    for pattern in (Unstructured(0.6), NM(2, 4), NM(1, 4)):
        once = Magnitude().solve(weight, None, pattern)
        again = Magnitude().solve(once.weight, None, pattern)
        assert torch.equal(once.mask, again.mask)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2), (1, 1)])
def test_no_such_groups(n: int, m: int) -> None:
    with pytest.raises(RecipeError, match="is no pattern"):
        NM(n, m)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool)])
def test_a_given_mask_has_to_fit(mask) -> None:
    with pytest.raises(RecipeError, match="a given mask must be bool"):
        Magnitude().solve(torch.ones(2, 3), None, Given(mask))


def test_patterns_read_as_people_write_them() -> None:
    assert [str(p) for p in (NM(2, 4), Unstructured(0.5))] == ["2:4", "0.5"]
