"""Statistics against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.errors import CalibrationError
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.solvers import Moments, Norms, SecondMoment, Unstructured
from graphprune.solvers.precision import exact
from solvers.oracle import inputs

KINDS = [Norms, Moments]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums(kind, dtype: torch.dtype) -> None:
    x = (inputs(300, 500) / 10).to(dtype)
    statistic = kind(500)
    statistic.add(x[:7])
    statistic.add(x[7:27].reshape(4, 5, 500))
    statistic.add(x[27:27])
    statistic.add(x[27])
    statistic.add(x[28:].reshape(2, 4, 34, 500))
    wide = x.double().numpy()
    assert statistic.tokens == 300
    np.testing.assert_allclose(statistic.norms, np.sqrt((wide**2).mean(0)), rtol=1e-5)
    np.testing.assert_allclose(statistic.means, wide.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistic.variances, wide.var(0), rtol=1e-4)
    if kind is Moments:
        wanted = wide.T @ wide / 300
        np.testing.assert_allclose(statistic.hessian, wanted, atol=1e-5 * wanted.max())
        assert torch.equal(statistic.hessian, statistic.hessian.T)


def test_float64_is_exact() -> None:
    x = inputs(200, 30)
    statistic = SecondMoment(30, dtype=torch.float64)
    for part in x.split(17):
        statistic.add(part)
    wanted = x.numpy().T @ x.numpy() / 200
    np.testing.assert_allclose(statistic.hessian, wanted, rtol=1e-12, atol=1e-12)


def test_half_precision_sums_do_not_overflow() -> None:
    x = torch.full((2048, 4), 300.0, dtype=torch.float16)  # 2048 * 300² is beyond float16
    for kind in KINDS:
        statistic = kind(4)
        statistic.add(x)
        assert statistic.norms.tolist() == [300.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind) -> None:
    x = inputs(100, 40)
    one, left, right = kind(40), kind(40), kind(40)
    one.add(x)
    left.add(x[:31])
    right.add(x[31:])
    left.merge(right)
    assert left.tokens == 100
    torch.testing.assert_close(left.norms, one.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(left.means, one.means)
    if kind is Moments:
        torch.testing.assert_close(left.hessian, one.hessian)
    with pytest.raises(CalibrationError, match="40 and 41 features"):
        left.merge(kind(41))


@pytest.mark.parametrize("kind", KINDS)
def test_silence(kind) -> None:
    statistic = kind(3)
    assert statistic.silent
    assert statistic.norms.tolist() == statistic.means.tolist() == [0, 0, 0]
    statistic.add(torch.zeros(4, 3))
    assert statistic.silent
    statistic.add(torch.eye(3)[:1])
    assert not statistic.silent


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_width_and_overflow_are_told(kind) -> None:
    with pytest.raises(CalibrationError, match=r"\[2, 5\] do not end in 4 features") as caught:
        kind(4).add(torch.ones(2, 5), "layers.0.up")
    assert caught.value.where == "layers.0.up"
    with pytest.raises(CalibrationError, match="too large to square"):
        kind(4).add(torch.full((2, 4), 1e20), "layers.0.up")


def test_large_features_are_counted_where_each_has_a_sum() -> None:
    x = torch.full((2, 4), 1e19)  # 2e38 each: within float32, but not all together
    for kind in (*KINDS, SecondMoment):
        statistic = kind(4)
        statistic.add(x)
        assert statistic.norms.tolist() == pytest.approx([1e19] * 4)
        with pytest.raises(CalibrationError, match="too large to square"):
            statistic.add(2 * x)


@pytest.mark.parametrize("kind", [*KINDS, SecondMoment])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_told(kind, bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 4, dtype=dtype)
    x[1, 1, 2] = bad
    with pytest.raises(CalibrationError, match="1 of 24 activations are NaN or inf") as caught:
        kind(4).add(x, "layers.0.up")
    assert caught.value.where == "layers.0.up"
    assert "feature 2 of token 4" in str(caught.value.why)


def test_means_are_kept_by_those_who_need_them() -> None:
    statistic = SecondMoment(4)
    statistic.add(torch.eye(4))
    with pytest.raises(CalibrationError, match="needs means"):
        DSnoT().solve(torch.ones(3, 4), statistic, Unstructured(0.5))


def test_what_is_derived_is_kept_until_more_comes() -> None:
    statistic = SecondMoment(4)
    statistic.add(torch.eye(4))
    makes = iter(range(10))
    assert [statistic.derived("a", lambda: next(makes)) for _ in range(2)] == [0, 0]
    statistic.add(torch.eye(4))
    assert statistic.derived("a", lambda: next(makes)) == 1
    other = SecondMoment(4)
    statistic.merge(other)
    assert statistic.derived("a", lambda: next(makes)) == 2


def test_sums_of_a_type_too_narrow_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"torch\.bfloat16"):
        SecondMoment(4, dtype=torch.bfloat16)


def test_products_are_exact_inside_and_as_before_outside() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
