"""Means over windows with 95 % intervals, by Student's t.

A window is one observation: the tokens in it are of one piece of text and depend on each other.
Two models are compared window by window, so that it cancels how hard a text is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

from graphprune.quality.result import Estimate

LEVEL = 0.95


def mean_estimate(values: Sequence[float], low: float, high: float) -> Estimate:
    """Return the mean of values, one of each window, that lie between `low` and `high`."""
    value, half = _mean(values)
    if half is None:
        return Estimate(value)
    return Estimate(value, max(low, value - half), min(high, value + half))


def ratio_estimate(dense: Sequence[float], slim: Sequence[float]) -> Estimate:
    """Return the ratio of two perplexities, from the mean losses of the same windows in nats."""
    value, half = _mean([s - d for d, s in zip(dense, slim, strict=True)])
    if half is None:
        return Estimate(_exp(value))
    return Estimate(_exp(value), _exp(value - half), _exp(value + half))


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its interval; None for one value."""
    value = math.fsum(values) / len(values)
    if len(values) < 2:
        return value, None
    return value, student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@cache
def student(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t: 2.040 for 31 degrees of freedom.

    The probability of |T| < t is a finite sum over the angle atan(t / sqrt(degrees)) (Abramowitz
    and Stegun, 26.7.3 and 26.7.4), which is bisected.
    """
    normal = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    if degrees > 1000:
        return normal * (1 + (normal**2 + 1) / (4 * degrees))
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < LEVEL else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # past this it doesn't fit in a float
