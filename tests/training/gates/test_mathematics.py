"""Gates and their penalty, by numbers that were worked out with the original code or by hand."""

import numpy as np
import pytest
import torch

from graphprune.training.gates.cut import kept
from graphprune.training.gates.hard_concrete import (
    LIMIT,
    clamp,
    open_probability,
    sampled,
    settled,
)
from graphprune.training.gates.lagrangian import closed_share, penalty, warmed

LOCATIONS = (-4.60517, -2, -1, 0, 1, 2, 4.60517)
CLOSED = (0.95287, 0.599025, 0.354665, 0.168178, 0.069229, 0.026633, 0.002018)


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("a", "closed"), zip(LOCATIONS, CLOSED, strict=True))
def test_gates_are_zero_and_one_as_often_as_the_formula_says(a, closed):
    assert 1 - float(open_probability(wide(a))) == pytest.approx(closed, abs=1e-5)
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = sampled(wide(a), u)
    assert float((z == 0).double().mean()) == pytest.approx(closed, abs=3e-3)
    mirrored = 1 - float(open_probability(wide(-a)))
    assert float((z == 1).double().mean()) == pytest.approx(mirrored, abs=3e-3)


def test_gates_without_noise():
    right = (0.003965, 0.083173, 0.231475, 0.5, 0.768525, 0.916827, 0.996035)
    assert settled(wide(*LOCATIONS)).tolist() == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize(
    ("a", "u", "z"), [(0, 0.9, 1), (2, 0.3, 0.91915), (-1, 0.7, 0.431583), (0, 0.1, 0)]
)
def test_gates_for_given_noise(a, u, z):
    assert float(sampled(wide(a), wide(u))) == pytest.approx(z, abs=1e-5)


def test_gradients_of_a_gate_and_of_its_probability():
    a = wide(0.5).requires_grad_()
    z = sampled(a, wide(0.4))
    z.sum().backward()
    assert (z.item(), a.grad.item()) == pytest.approx((0.54247, 0.447745), abs=1e-5)
    a.grad = None
    probability = open_probability(a)
    probability.sum().backward()
    assert (probability.item(), a.grad.item()) == pytest.approx((0.890767, 0.097301), abs=1e-5)


def test_noise_at_the_edges_gives_finite_gates():
    assert sampled(wide(0, 0), wide(0, 1)).tolist() == [0, 1]


def test_locations_stay_where_they_have_gradients():
    a = wide(-9, 0, 9)
    clamp(a)
    assert a.tolist() == [-LIMIT, 0, LIMIT]


def test_penalty_of_two_layers():
    a = torch.tensor(
        [[2.0, 1.0, -1.0, 0.0], [4.0, -2.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True
    )
    first, second = wide(0.3).requires_grad_(), wide(2.0).requires_grad_()
    shares = [closed_share(row) for row in a]
    assert [float(s) for s in shares] == pytest.approx([0.154676, 0.327743], abs=1e-5)
    value = penalty(shares, [0.5, 0.5], first, second)
    value.backward()
    assert float(value) == pytest.approx(0.071284, abs=1e-5)
    assert float(first.grad) == pytest.approx(-0.25879, abs=1e-5)
    assert float(second.grad) == pytest.approx(0.074461, abs=1e-5)
    right = [[0.003504, 0.008709, 0.030936, 0.018908], [0.000179, 0.01168, 0.01168, 0.004732]]
    assert a.grad.tolist() == [pytest.approx(row, abs=1e-5) for row in right]


def test_without_multipliers_gates_feel_nothing_and_the_multipliers_do():
    a = wide(2.0, 1.0, -1.0, 0.0).requires_grad_()
    first, second = wide(0.0).requires_grad_(), wide(0.0).requires_grad_()
    penalty([closed_share(a)], [0.5], first, second).backward()
    assert not a.grad.any()
    assert float(first.grad) == pytest.approx(0.154676 - 0.5, abs=1e-5)


def test_one_layer_over_and_one_under_cost_the_quadratic_term_only():
    value = penalty([wide(0.3)[0], wide(0.7)[0]], [0.5, 0.5], wide(-1)[0], wide(2)[0])
    assert float(value) == pytest.approx(0.08)


def test_the_target_warms_up():
    found = [warmed(0.5, step, 640) for step in (0, 1, 64, 320, 640, 3200)]
    assert found == pytest.approx([0, 0.000781, 0.05, 0.25, 0.5, 0.5], abs=1e-6)
    assert warmed(0.5, 0, 0) == 0.5


def test_the_cut_has_exact_counts():
    a = np.array([3.0, -1.0, 0.2, 4.605, -3.0, 1.0])
    assert kept(a, 4) == (0, 2, 3, 5)
    gates = settled(torch.from_numpy(a[list(kept(a, 4))]))
    assert gates.tolist() == pytest.approx([0.973403, 0.559714, 0.996034, 0.768525], abs=1e-5)
    assert kept(np.full(4, LIMIT), 2) == (0, 1)
    assert kept(np.full(3, -3.0), 1) == (0,)
    assert kept(np.full(4, LIMIT), 2, np.array([0.0, 1.0, 1.0, 5.0])) == (1, 3)
    assert kept(np.array([1.0, 2.0]), 1, np.array([9.0, 0.0])) == (1,)


def test_expectation_misses_the_target_where_the_cut_does_not():
    a = torch.tensor([4.6] * 60 + [-4.6] * 68)
    closed = float(closed_share(a)) * len(a)
    assert closed == pytest.approx(64.901, abs=1e-2)
    assert len(a) - round(closed) == 63
    assert len(kept(a.numpy(), 64)) == 64


def test_expected_size_is_the_product_of_the_nested_shares():
    """Hidden x heads x layers, and hidden x ffn x layers, as the original counts parameters."""
    share = float(open_probability(wide(0)))
    assert share**3 * 163840 == pytest.approx(94299.94, abs=0.5)
