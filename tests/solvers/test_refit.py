"""The refit is the least-squares solution on the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.errors import CalibrationError
from graphprune.solvers import Reconstruct, SecondMoment, relative_error
from solvers.oracle import error_on, inputs, layer, lost, moment


@pytest.mark.parametrize("as_mask", [True, False])
def test_least_squares(as_mask: bool) -> None:
    weight, statistic, x = layer(9, 30)
    index = torch.tensor([1, 2, 5, 11, 12, 20, 29])
    kept = (
        torch.zeros(30, dtype=torch.bool).index_fill(0, index, True) if as_mask else index.flip(0)
    )
    solved = Reconstruct(damping=0).solve(weight, statistic, kept)
    wanted, *_ = np.linalg.lstsq(x.numpy()[:, index], (x @ weight.T).numpy(), rcond=None)
    np.testing.assert_allclose(solved.weight[:, index].numpy(), wanted.T, atol=1e-9)
    gone = [j for j in range(30) if j not in index.tolist()]
    assert (solved.weight[:, gone] == 0).all()
    assert torch.equal(solved.mask, (solved.weight != 0))
    assert solved.error == pytest.approx(error_on(x, weight, solved.weight), rel=1e-9)
    cut = torch.where(solved.mask, weight, 0)
    assert lost(solved) < relative_error(weight, cut, statistic)
    assert solved.notes == ()


def test_damping_draws_to_the_dense_weights() -> None:
    weight, statistic, x = layer(4, 12)
    at, gone = np.arange(6), np.arange(6, 12)
    h = x.numpy().T @ x.numpy() / len(x)
    for damping in (0.01, 0.5):
        solved = Reconstruct(damping).solve(weight, statistic, torch.from_numpy(at))
        d = damping * np.diag(h)[at].mean() * np.eye(6)
        w = weight.numpy()
        wanted = (w @ h[:, at] + w[:, at] @ d) @ np.linalg.inv(h[np.ix_(at, at)] + d)
        np.testing.assert_allclose(solved.weight.numpy()[:, at], wanted, atol=1e-10)
    assert len(gone) == 6


def test_rank_deficient_and_dead_inputs() -> None:
    x = inputs(5, 16)
    x[:, 3] = 0
    weight = torch.randn(4, 16, dtype=torch.float64)
    kept = torch.arange(0, 12)
    solved = Reconstruct(damping=0).solve(weight, moment(x), kept)
    assert solved.notes == (
        "1 of 12 inputs are always zero",
        "damping raised from 0 to 1e-06",
    )
    assert lost(solved) < 1e-6  # five tokens, eleven live inputs
    assert torch.equal(solved.weight[:, 3], weight[:, 3])


def test_nothing_to_fit() -> None:
    weight, statistic, _ = layer(4, 8)
    everything = Reconstruct().solve(weight, statistic, torch.arange(8))
    assert torch.equal(everything.weight, weight)
    assert everything.error == 0
    nothing = Reconstruct().solve(weight, statistic, torch.zeros(8, dtype=torch.bool))
    assert not nothing.weight.any()
    assert nothing.error == pytest.approx(1)
    silent = Reconstruct().solve(weight, SecondMoment(8), torch.arange(4))
    assert torch.equal(silent.weight[:, :4], weight[:, :4])
    assert silent.error is None
    assert silent.notes
    x = inputs(50, 8)
    x[:, :4] = 0
    dead = Reconstruct().solve(weight, moment(x), torch.arange(4))
    assert torch.equal(dead.weight[:, :4], weight[:, :4])
    assert dead.error == pytest.approx(1)


def test_float32_is_solved_in_float64() -> None:
    weight, statistic, x = layer(6, 40, dtype=torch.float32)
    solved = Reconstruct(0).solve(weight, statistic, torch.arange(30))
    wanted, *_ = np.linalg.lstsq(
        x.numpy()[:, :30], x.numpy() @ weight.double().numpy().T, rcond=None
    )
    np.testing.assert_allclose(solved.weight[:, :30].numpy(), wanted.T, rtol=0, atol=2e-3)
    assert solved.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "kept", [torch.tensor([8]), torch.tensor([-1]), torch.tensor([0.5]), torch.ones(3) > 0]
)
def test_kept_inputs_have_to_be_there(kept) -> None:
    weight, statistic, _ = layer(4, 8)
    with pytest.raises(CalibrationError, match="kept inputs"):
        Reconstruct().solve(weight, statistic, kept)


def test_a_statistic_of_another_width_is_told() -> None:
    weight, _, _ = layer(4, 8)
    with pytest.raises(CalibrationError, match="9 features does not fit a weight of 8 inputs"):
        Reconstruct().solve(weight, SecondMoment(9), torch.arange(4))
    with pytest.raises(CalibrationError, match="takes a floating-point matrix"):
        Reconstruct().solve(weight[None], SecondMoment(8), torch.arange(4))


def halves(tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A weight of 24 inputs, half of which follow from others, and two sets of samples."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(2 * tokens, 24, generator=g, dtype=torch.float64)
    x[:, ::2] += x[:, 1::2]
    weight = torch.randn(6, 24, generator=g, dtype=torch.float64)
    return weight, [x[:tokens], x[tokens:]]


def test_few_tokens_damp() -> None:
    """As many as inputs stay: least squares then learns chance, and errs on other samples."""
    weight, (first, second) = halves(20)
    kept = torch.arange(18)
    plain = Reconstruct()
    found, learnt = plain.tuned(weight, [moment(first), moment(second)], kept)
    assert found.damping in (1e-2, 1e-1, 1.0, 10.0)
    for seen, x, new in ((first, second, learnt[0]), (second, first, learnt[1])):
        statistic = moment(seen)
        torch.testing.assert_close(new, found.fit(weight, statistic, kept)[0])
        assert error_on(x, weight, new) < error_on(x, weight, plain.fit(weight, statistic, kept)[0])


def test_many_tokens_do_not() -> None:
    weight, (first, second) = halves(2000)
    kept = torch.arange(18)
    plain = Reconstruct()
    found, learnt = plain.tuned(weight, [moment(first), moment(second)], kept)
    assert found is plain
    assert torch.equal(learnt[0], plain.fit(weight, moment(first), kept)[0])
    everything, same = plain.tuned(weight, [moment(first), moment(second)], torch.arange(24))
    assert everything is plain
    assert torch.equal(same[1], weight)
