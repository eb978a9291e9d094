"""The hard concrete distribution (Louizos et al., 2018): gates from 0 to 1, often exactly 0 or 1.

A gate has a location a. A stretched, clamped sigmoid of a and of noise is 0 with a probability that
has a gradient in a, so that a number of gates to be open can be trained for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""What the sigmoid is stretched to, before it is cut off at 0 and 1."""

LIMIT = math.log(100)
"""The largest location, and less than nothing the smallest: beyond them gradients vanish."""

SHARPNESS = 0.8
"""What a location is multiplied by where there is no noise, before it is divided by `TEMPERATURE`:
LLM-Shearing's choice (Xia et al., 2024)."""

_EDGE = 1e-6
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)


def sampled(a: Tensor, u: Tensor) -> Tensor:
    """Gates for given noise.

    Args:
        a: locations.
        u: numbers of a uniform distribution from 0 to 1, of the same shape.

    Returns:
        Gates from 0 to 1, with gradients in `a` where they are neither.
    """
    u = u.clamp(_EDGE, 1 - _EDGE)
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + a) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def settled(a: Tensor) -> Tensor:
    """Gates without noise: above 0, and below 1."""
    return torch.sigmoid(a * SHARPNESS / TEMPERATURE)


def open_probability(a: Tensor) -> Tensor:
    """The probability that a sampled gate is above 0."""
    return torch.sigmoid(a - _SHIFT).clamp(_EDGE, 1 - _EDGE)


@torch.no_grad()
def clamp(a: Tensor) -> None:
    """Keep locations where they have gradients, in place."""
    a.clamp_(-LIMIT, LIMIT)
