"""Closing a gap, where there is something to learn and where there is nothing."""

from __future__ import annotations

import pytest
import torch

from graphprune.errors import CalibrationError
from graphprune.solvers.gap import GapClosing, Sample


def sample(x: torch.Tensor, gap: torch.Tensor) -> Sample:
    return Sample(len(x), x.T @ x / len(x), gap.T @ x / len(x))


def made(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, a gap whose first output follows from them, the second being noise, and how."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * tokens, 20, generator=generator, dtype=torch.float64)
    rule = torch.randn(20, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(2 * tokens, generator=generator, dtype=torch.float64)
    return x, torch.stack([x @ rule, 5 * noise], 1), rule


def test_only_what_the_other_half_confirms_is_learnt() -> None:
    x, gap, rule = made(25, 0)
    halves = [sample(x[:25], gap[:25]), sample(x[25:], gap[25:])]
    kept = torch.arange(20)
    base = [torch.zeros(2, 20, dtype=torch.float64)] * 2
    change = GapClosing().change(halves, base, sample(x, gap), kept)
    torch.testing.assert_close(change[0], rule, rtol=1e-2, atol=1e-2)
    assert not change[1].any()
    fresh, missing, _ = made(500, 1)
    least = torch.linalg.lstsq(x, gap).solution.T
    for wrong, right in ((least, change),):
        errors = [(missing - fresh @ w.T).square().mean(0) for w in (wrong, right)]
        assert errors[1][1] < errors[0][1]


def test_removed_inputs_have_no_part() -> None:
    x, gap, _ = made(200, 2)
    halves = [sample(x[:200], gap[:200]), sample(x[200:], gap[200:])]
    kept = torch.tensor([0, 3, 7])
    base = [torch.zeros(2, 20, dtype=torch.float64)] * 2
    change = GapClosing(dampings=(1e-9,)).change(halves, base, sample(x, gap), kept)
    expected = torch.linalg.lstsq(x[:, kept], gap[:, :1]).solution.T
    torch.testing.assert_close(change[:1], expected, rtol=1e-6, atol=1e-6)


def test_dampings_are_checked() -> None:
    with pytest.raises(CalibrationError, match="positive"):
        GapClosing(dampings=(0.0,))


def test_a_massive_input_silences_no_other() -> None:
    """The result is the same in whatever units inputs are, and an input may be dead."""
    x, gap, rule = made(25, 0)
    units = torch.ones(20, dtype=torch.float64)
    units[3], units[5] = 1e5, 0.0
    scaled = x * units
    seen = gap - torch.outer(x[:, 5], torch.tensor([1.0, 0.0])) * rule[5]
    halves = [sample(scaled[:25], seen[:25]), sample(scaled[25:], seen[25:])]
    base = [torch.zeros(2, 20, dtype=torch.float64)] * 2
    change = GapClosing().change(halves, base, sample(scaled, seen), torch.arange(20))
    expected = torch.where(units > 0, rule, 0)
    torch.testing.assert_close(change[0] * units, expected, rtol=1e-2, atol=1e-2)


def test_fewer_tokens_than_inputs_say_nothing() -> None:
    """Two halves that are copies confirm each other, whatever they hold."""
    x, gap, _ = made(9, 3)
    half = sample(x[:9], gap[:9])
    base = [torch.zeros(2, 20, dtype=torch.float64)] * 2
    twice = Sample(18, half.hessian, half.cross)
    for kept, closes in ((torch.arange(20), False), (torch.arange(18), True)):
        change = GapClosing().change([half, half], base, twice, kept)
        assert change.shape == (2, len(kept))
        assert bool(change.any()) == closes
