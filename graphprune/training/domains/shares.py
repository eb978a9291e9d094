"""Shares of domains that follow their losses (dynamic batch loading, Xia et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Rule = Literal["paper", "code"]

_SMOOTHING = 1e-4
"""What the original code mixes with equal shares."""


def updated(
    shares: Sequence[float],
    losses: Sequence[float],
    reference: Sequence[float],
    *,
    rule: Rule = "paper",
    step_size: float = 1.0,
    floor: float = 0.0,
) -> list[float]:
    """The shares after a measurement: a domain that is behind its reference gets more.

    Where a loss is no number the domain keeps its share. A constant gap drives the share of a
    domain towards 1, which a floor under the others limits.

    Args:
        shares: they add up to 1.
        losses: of held-out samples.
        reference: losses that are aimed at.
        rule: "paper" multiplies by ``exp(step_size * max(loss - reference, 0))``, so that a share
            of 0 stays 0; "code", that of the original, lets domains that are ahead lose as well,
            and mixes in a little of equal shares.
        step_size: how fast shares follow.
        floor: the least share of each domain.
    """
    finite = [math.isfinite(loss) for loss in losses]
    gaps = [
        loss - aim if ok else 0.0 for loss, aim, ok in zip(losses, reference, finite, strict=True)
    ]
    if rule == "paper":
        gaps = [max(gap, 0.0) for gap in gaps]
    grown = [w * math.exp(step_size * gap) for w, gap in zip(shares, gaps, strict=True)]
    left = 1 - sum(w for w, ok in zip(shares, finite, strict=True) if not ok)
    total = sum(w for w, ok in zip(grown, finite, strict=True) if ok)
    scale = left / total if total else 0.0
    found = [w * scale if ok else old for w, old, ok in zip(grown, shares, finite, strict=True)]
    mixed = _SMOOTHING if rule == "code" and all(finite) else 0.0
    equal = 1 / len(found)
    found = [(1 - mixed) * w + mixed * equal for w in found]
    return [floor + (1 - floor * len(found)) * w for w in found]
