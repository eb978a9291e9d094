"""What a plan tells its readers of each structure, beside the units that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphprune.analysis.structure import Structure
    from graphprune.plan.units import FloatArray

_LISTED = 8
"""Parameters that are told one by one."""


@dataclass(frozen=True)
class ScoreSummary:
    """The scores of a structure's units, as they were compared; None where there is none.

    Attributes:
        lowest_kept: the lowest score of a unit that stays.
        highest_removed: the highest one of a unit that goes.
        kept_share: what stays of the sum of all scores.
    """

    lowest_kept: float | None = None
    highest_removed: float | None = None
    kept_share: float | None = None

    @classmethod
    def of(cls, price: FloatArray, removed: int) -> ScoreSummary:
        """Sum up.

        Args:
            price: scores in the order in which units go; infinite for those that have to stay.
            removed: how many of them go.
        """
        kept, gone = price[removed:], price[:removed]
        weighed = kept[np.isfinite(kept)]
        total = float(price.sum()) if np.isfinite(price).all() and (price >= 0).all() else 0.0
        return cls(
            _rounded(weighed.min()) if len(weighed) else None,
            _rounded(gone.max()) if len(gone) and np.isfinite(gone).all() else None,
            _rounded(kept.sum() / total) if total else None,
        )


@dataclass(frozen=True)
class Notes:
    """What isn't needed to apply a plan.

    Attributes:
        role: of the structure; "" for none.
        parameters: what it touches: ``name:dimension``, numbers of layers as ``*`` where several
            are meant; of layers the names alone.
        scores: None where the units weren't chosen by scores of their own.
    """

    role: str = ""
    parameters: tuple[str, ...] = ()
    scores: ScoreSummary | None = None


def notes_of(structure: Structure, scores: ScoreSummary | None = None) -> Notes:
    """The notes of a structure."""
    if structure.blocks:
        names = [name for block in structure.blocks for name in block.parameters]
    else:
        names = [f"{name}:{dim}" for name, dim in structure.members]
    return Notes(structure.role, _folded(names), scores)


def _folded(names: list[str]) -> tuple[str, ...]:
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        glob = ".".join("*" if part.isdecimal() else part for part in parts)
        alike.setdefault(glob, []).append(name)
    found = [glob if len(own) > 1 else own[0] for glob, own in alike.items()]
    more = len(found) - _LISTED
    return (*found[:_LISTED], f"and {more} more") if more > 0 else tuple(found)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
