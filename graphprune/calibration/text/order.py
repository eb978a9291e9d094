"""The order of windows from several sources.

Refits tell how strongly to fit by how well one half of the samples predicts the other, and samples
go to the halves in turns. So the two halves get different sources: what is learnt from some kinds
of text has to hold on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

_TRIED = 12
"""Sources up to which all ways to halve them are tried."""


def alternate(counts: Sequence[int], seed: int) -> Tensor:
    """Order windows so that two halves of the sources take turns.

    Args:
        counts: windows of each source; they are numbered source by source.
        seed: of the order within each half.

    Returns:
        int64 ``[windows]``. Where one half has more, its last ones come at the end.
    """
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    ranges = [torch.arange(begin, end) for begin, end in pairwise(ends)]
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        found[torch.randperm(len(found), generator=generator)]
        for side in halve(counts)
        for found in [torch.cat([torch.arange(0), *(ranges[i] for i in side)])]
    )
    both = min(len(first), len(second))
    turns = torch.stack([first[:both], second[:both]], 1).flatten()
    return torch.cat([turns, first[both:], second[both:]])


def halve(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Divide sources into two sides with windows as equal in number as can be.

    Returns:
        The numbers of the sources of either side; source 0 is on the first.
    """
    others = list(range(1, len(counts)))
    if len(counts) <= _TRIED:
        sides = [list(c) for size in range(len(counts)) for c in combinations(others, size)]
        second = min(sides, key=lambda side: abs(sum(counts) - 2 * sum(counts[i] for i in side)))
    else:  # the largest first, each to the lighter side
        weights, second = [counts[0], 0], []
        for i in sorted(others, key=lambda i: -counts[i]):
            lighter = int(weights[1] <= weights[0])
            weights[lighter] += counts[i]
            second += [i] * lighter
    return [i for i in range(len(counts)) if i not in second], sorted(second)
