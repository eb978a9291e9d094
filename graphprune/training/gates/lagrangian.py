"""What holds gates to a target: a penalty with multipliers that rise until it is met.

For each kind of structure ``λ1 (s - t) + λ2 (s - t)²``, s the expected share of closed gates and t
the target. Gates go down the slope of it, the multipliers up (Wang et al., 2020). While both are 0
gates feel nothing, but the multipliers do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.training.gates.hard_concrete import open_probability


def closed_share(a: Tensor) -> Tensor:
    """The expected share of the gates with locations `a` that are 0."""
    return 1 - open_probability(a).mean()


def penalty(
    shares: Sequence[Tensor], targets: Sequence[float], first: Tensor, second: Tensor
) -> Tensor:
    """The penalty of structures of one kind, a mean over them.

    The mean lets one of them be over and another under its target at the price of the quadratic
    term alone; the cut at the end has the exact counts in any case.

    Args:
        shares: expected share of closed gates of each.
        targets: the share that is to be closed of each.
        first: λ1, a scalar.
        second: λ2, a scalar.
    """
    gaps = torch.stack([s - t for s, t in zip(shares, targets, strict=True)])
    return (first * gaps + second * gaps.square()).mean()


def warmed(target: float, step: int, steps: int) -> float:
    """The target of a step: it rises linearly from 0.

    Args:
        target: in the end.
        step: from 0.
        steps: in which it rises.
    """
    return target * min(1.0, step / steps) if steps else target
