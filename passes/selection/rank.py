"""From member scores to the order in which a structure's units go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from graphprune.analysis.structure import Structure
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.plan.kept import Units
from graphprune.plan.units import FloatArray


def _geometric_mean(rows: FloatArray) -> FloatArray:
    if (rows < 0).any():
        raise PlanError(
            "scores below zero have no product that ranks units",
            hint="aggregate by sum, mean, max or last",
        )
    # Orders units as the product does; the product of hundreds of members would overflow.
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(np.log(rows).mean(axis=0)), dtype=np.float64)


AGGREGATES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "sum": lambda rows: rows.sum(axis=0),
    "mean": lambda rows: rows.mean(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "prod": _geometric_mean,
    "last": lambda rows: rows[-1],
}
"""How the scores of a unit's members are joined; rows stand in the order of the graph."""
SCALES: dict[str, Callable[[FloatArray], float]] = {
    "none": lambda scores: 1.0,
    "mean": lambda scores: float(scores.mean()),
    "max": lambda scores: float(scores.max()),
    "sum": lambda scores: float(scores.sum()),
}


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """A structure's units, the least important first.

    Attributes:
        structure: the structure whose units are ranked.
        order: ``[size]``, or ``[outer size, size]`` where every outer unit has its own order.
        price: ``[size]``, ascending: the score of the k-th unit to go, summed over outer units.
    """

    structure: Structure
    order: IntArray
    price: FloatArray

    def kept(self, count: int) -> Units:
        """The `count` most important units, ascending; one such list per outer unit."""
        best = np.sort(self.order[..., self.structure.size - count :], axis=-1)
        if best.ndim == 1:
            return tuple(best.tolist())
        return tuple(tuple(row) for row in best.tolist())


def rank(
    structure: Structure,
    scores: FloatArray,
    *,
    aggregate: str = "sum",
    normalize: str = "mean",
    removable: IntArray | None = None,
    ragged: bool = True,
) -> Ranked:
    """Order the units of a structure.

    Of units with equal scores the later goes first.

    Args:
        structure: the structure whose units are ranked.
        scores: ``[members, (outer size,) size]``.
        aggregate: how members are joined: sum, mean, max, prod (their geometric mean), or last:
            the one that the graph reads last alone, what multiplies by the units of an ffn or a
            head.
        normalize: what the scores are divided by: none (1), or their mean, max or sum. Scores of
            which some are negative, such as standard scores, are never divided.
        removable: the units that may go; the others come last. None: all.
        ragged: whether each outer unit of a ragged structure has its own order.

    Raises:
        PlanError: an option is unknown, or there is no product of negative scores.
    """
    check_option("aggregate", aggregate, AGGREGATES)
    check_option("normalize", normalize, SCALES)
    joined = AGGREGATES[aggregate](scores) if len(scores) else np.zeros(scores.shape[1:])
    if joined.ndim > 1 and not ragged:
        joined = joined.sum(axis=0)
    scale = 1.0 if (joined < 0).any() else SCALES[normalize](joined)
    joined = joined / scale if scale else joined
    if removable is not None:
        stays = np.ones(structure.size, dtype=bool)
        stays[removable] = False
        joined = np.where(stays, np.inf, joined)
    order = structure.size - 1 - np.argsort(joined[..., ::-1], axis=-1, kind="stable")
    price = np.take_along_axis(joined, order, axis=-1)
    if price.ndim > 1:
        price = price.sum(axis=0)
    return Ranked(structure, order.astype(np.int64), price)


def check_option(name: str, value: str, valid: Mapping[str, object]) -> None:
    """Refuse a value that is not one of the valid ones."""
    if value not in valid:
        raise PlanError(f"unknown {name} {value!r}", hint=f"one of {', '.join(valid)}")
