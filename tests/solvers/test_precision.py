"""What counts as finite."""

from __future__ import annotations

import pytest
import torch

from graphprune.solvers.precision import finite

BIG = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], True),
        ([1.0, -2.0], True),
        ([BIG, BIG, -BIG], True),  # the sum isn't
        ([float("inf"), 1.0], False),
        ([float("inf"), -float("inf")], False),
        ([0.0, float("nan")], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite(values: list[float], wanted: bool, dtype: torch.dtype) -> None:
    assert finite(torch.tensor(values, dtype=dtype)) == wanted


def test_a_short_type_whose_sum_is_too_large() -> None:
    assert finite(torch.full((4,), 60000.0, dtype=torch.float16))
