"""Layer budgets: exact means, within bounds, in the order of the outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import RecipeError
from graphprune.solvers import Unstructured, outlier_ratio, owl, uniform


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
