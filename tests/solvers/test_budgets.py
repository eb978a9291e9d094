"""Layer budgets: exact means, within bounds, in the order of the outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import CalibrationError, RecipeError
from graphprune.solvers import Unstructured, outlier_ratio, owl, uniform
from graphprune.solvers.budget import below_threshold, in_whole, least_error


def test_uniform() -> None:
    assert uniform([3, 5], 0.4) == [0.4, 0.4]


def test_owl_by_the_formula() -> None:
    ratios = np.array([0.5, 2.0, 1.0, 4.0])
    density = (ratios - 0.5) / 3.5 * 0.16
    density += 0.3 - density.mean()
    found = owl(ratios.tolist(), [10, 10, 10, 10], 0.7)
    np.testing.assert_allclose(found, 1 - density, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_owl_is_exact_and_within_bounds(data) -> None:
    count = data.draw(st.integers(1, 12))
    ratios = data.draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    sparsity = data.draw(st.floats(0, 0.999))
    spread = data.draw(st.floats(0, 0.99))
    found = owl(ratios, sizes, sparsity, spread)
    assert all(0 <= s < 1 for s in found)
    assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-9)
    order = np.argsort(ratios)
    assert (np.diff(np.array(found)[order]) <= 1e-12).all()
    assert np.ptp(found) <= 2 * spread + 1e-9
    for s in found:
        Unstructured(s)


def test_equal_ratios_are_uniform() -> None:
    assert owl([2.0, 2.0, 2.0], [1, 2, 3], 0.7) == [0.7] * 3  # not NaN


def test_densities_stay_in_range() -> None:
    found = owl([0.0, 1.0, 5.0], [100, 100, 100], 0.9, spread=0.4)  # a density of -.175 otherwise
    assert max(found) == 0.99
    assert np.mean(found) == pytest.approx(0.9, abs=1e-12)


def test_outlier_ratio() -> None:
    a, b = torch.ones(10, 10), torch.ones(5, 4)
    a[0, :3] = 40
    b[1, 1] = 8
    everything = np.concatenate([a.numpy().ravel(), b.numpy().ravel()])
    for threshold in (3.0, 5.0):
        wanted = (everything > threshold * everything.mean()).mean()
        assert outlier_ratio([a, b], threshold) == pytest.approx(wanted)
    assert outlier_ratio([]) == 0


@pytest.mark.parametrize(
    "arguments",
    [([1.0], [1, 2], 0.5), ([1.0, float("nan")], [1, 2], 0.5), ([1.0, 2.0], [1, 2], 1.0),
     ([1.0, 2.0], [1, 0], 0.5), ([], [], 0.5), ([1.0, 2.0], [1, 2], 0.5, -0.1)],
)  # fmt: skip
def test_arguments_out_of_range(arguments) -> None:
    with pytest.raises(RecipeError):
        owl(*arguments)


def cheapest(levels, errors, sizes, total) -> float:
    """The least sum of errors when layers lose whole weights, by trying all ways to deal them."""
    best = {0: 0.0}
    for row, size in zip(errors, sizes, strict=True):
        counts = range(round(levels[0] * size), round(levels[-1] * size) + 1)
        own = np.interp([c / size for c in counts], levels, row)
        new: dict[int, float] = {}
        for count, error in zip(counts, own, strict=True):
            for before, lost in best.items():
                if lost + error < new.get(before + count, np.inf):
                    new[before + count] = lost + error
        best = new
    return best[total]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_of_convex_errors_is_least(data) -> None:
    count = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.sampled_from([10, 20, 50]), min_size=count, max_size=count))
    levels = data.draw(st.sampled_from([[0.0, 0.3, 0.4, 0.9], [0.2, 0.5], [0.1, 0.2, 0.3]]))
    rises = st.lists(st.floats(0, 9), min_size=len(levels) - 1, max_size=len(levels) - 1)
    errors = [[0.0, *np.cumsum(sorted(data.draw(rises)) * np.diff(levels))] for _ in sizes]
    low, high = (sum(round(s * size) for size in sizes) for s in (levels[0], levels[-1]))
    total = data.draw(st.integers(low, high))
    sparsity = min(max(total / sum(sizes), levels[0]), levels[-1])
    found = least_error(levels, errors, sizes, sparsity)
    assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-12)
    assert all(levels[0] <= s <= levels[-1] for s in found)
    reached = sum(np.interp(s, levels, row) for s, row in zip(found, errors, strict=True))
    assert reached == pytest.approx(cheapest(levels, errors, sizes, total), abs=1e-9)


def test_errors_that_are_not_convex_count_by_their_hull() -> None:
    # The second layer costs nothing up to .3, and little more at .5 than the hump at .4 says.
    found = least_error([0.3, 0.4, 0.5], [[0.0, 1.0, 2.0], [0.0, 5.0, 1.0]], [10, 10], 0.4)
    assert found == pytest.approx([0.3, 0.5])
    assert least_error([0.1, 0.2], [[1.0, 1.0]] * 3, [1, 2, 3], 0.2) == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    "arguments",
    [([0.2, 0.4], [[0.0, 1.0]], [5], 0.5), ([0.4, 0.2], [[0.0, 1.0]], [5], 0.3),
     ([0.2, 0.4], [[0.0, float("nan")]], [5], 0.3), ([0.2, 0.4], [[0.0, 1.0]], [5, 5], 0.3)],
)  # fmt: skip
def test_errors_that_make_no_budget(arguments) -> None:
    with pytest.raises(RecipeError):
        least_error(*arguments)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_one_threshold_for_all_tensors(data) -> None:
    """As a stable sort of all magnitudes together."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    values = st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40]), st.floats(-1e4, 1e4, width=32)),
        min_size=1, max_size=30,
    )  # fmt: skip
    tensors = [
        torch.tensor(data.draw(values), dtype=dtype) for _ in range(data.draw(st.integers(1, 5)))
    ]
    sparsity = data.draw(st.floats(0, 0.99))
    found = below_threshold(lambda: tensors, sparsity)
    everything = torch.cat(tensors).double().abs().numpy()
    owner = np.repeat(range(len(tensors)), [len(t) for t in tensors])
    first = np.argsort(everything, kind="stable")[: round(sparsity * len(everything))]
    assert found == np.bincount(owner[first], minlength=len(tensors)).tolist()


def test_a_threshold_of_tensors_of_two_types() -> None:
    near = 1 + 2**-40
    tensors = [torch.tensor([near, 3.0], dtype=torch.float64), torch.tensor([1.0, 2.0])]
    assert below_threshold(lambda: tensors, 0.25) == [0, 1]
    assert below_threshold(lambda: tensors, 0.5) == [1, 1]
    with pytest.raises(CalibrationError, match="1 of 2 weights are NaN or infinite"):
        below_threshold(lambda: [torch.tensor([1.0, float("inf")])], 0.5)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shares_in_whole_grains(data) -> None:
    count = data.draw(st.integers(1, 8))
    grains = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    sizes = [g * data.draw(st.integers(30, 40)) for g in grains]  # room for half a grain of 9
    shares = [data.draw(st.floats(0.2, 0.8)) for _ in grains]
    found = in_whole(shares, sizes, grains)
    counts = [s * n for s, n in zip(found, sizes, strict=True)]
    wanted = sum(s * n for s, n in zip(shares, sizes, strict=True))
    assert abs(sum(counts) - wanted) <= grains[-1] / 2 + 1e-6
    for i, c in enumerate(counts):
        assert c / grains[i] == pytest.approx(round(c / grains[i]), abs=1e-9)
        assert abs(c - shares[i] * sizes[i]) <= (max(grains[: i + 1]) + grains[i]) / 2 + 1e-6


def test_scores_may_be_made_anew() -> None:
    class Anew:
        made = 0

        def __iter__(self):
            for i in range(3):
                self.made += 1
                yield torch.tensor([1.0, 1.0, 1.0, 50.0 * i])

    scores = Anew()
    assert outlier_ratio(scores, 3.0) == outlier_ratio(iter(list(Anew())), 3.0) == 2 / 12
    assert scores.made == 6
