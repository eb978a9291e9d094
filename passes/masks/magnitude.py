"""Magnitude: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphprune.solvers.pattern import Group, Pattern
from graphprune.solvers.solved import Solved, check, masked
from graphprune.solvers.statistic import Norms, Statistic


@dataclass(frozen=True)
class Magnitude:
    """Remove the weights of least ``|w|``; the others keep their values.

    Han et al., Learning both Weights and Connections, 2015 (arXiv:1506.02626).

    Attributes:
        group: weights that compete: a layer's or a row's.
    """

    needs_data: ClassVar[bool] = False
    statistic: ClassVar[type[Norms]] = Norms
    group: Group = "layer"

    def solve(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern) -> Solved:
        """Prune one layer.

        Args:
            weight: [out, in].
            statistic: used for the error only; may be None.
            pattern: what the mask may be.

        Raises:
            CalibrationError: see `check`.
        """
        check(weight, statistic)
        mask = pattern.mask(weight.detach().abs(), weight, group=self.group)
        return masked(weight, mask, statistic, pattern)


def without_data(
    weight: Tensor, statistic: Statistic, pattern: Pattern, group: Group = "layer"
) -> Solved | None:
    """What a solver that needs data does where there is none: magnitude, and a note.

    Returns:
        None where there is data.
    """
    check(weight, statistic)
    if not statistic.silent:
        return None
    came = f"all {statistic.tokens} input vectors are zero" if statistic.tokens else "no input came"
    mask = pattern.mask(weight.detach().abs(), weight, group=group)
    return masked(weight, mask, statistic, pattern, (f"{came}: pruned by magnitude",))
