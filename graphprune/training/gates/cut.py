"""The cut at the end: exact counts, by the locations of the gates."""

from __future__ import annotations

import numpy as np

from graphprune.plan.units import FloatArray


def kept(locations: FloatArray, count: int, scores: FloatArray | None = None) -> tuple[int, ...]:
    """The units whose gates are the most open.

    All gates begin at one place, so that ties are common. Of equal ones the unit with the higher
    score stays, and then the earlier one.

    Args:
        locations: ``[units]``.
        count: how many stay.
        scores: ``[units]``; None for equal ones.

    Returns:
        `count` unit numbers, ascending.
    """
    beside = np.zeros(len(locations)) if scores is None else np.asarray(scores, dtype=np.float64)
    order = np.lexsort((np.arange(len(locations)), -beside, -np.asarray(locations)))
    return tuple(sorted(int(unit) for unit in order[:count]))
