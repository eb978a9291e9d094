"""Rounding to a grid that holds zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Grid:
    """An asymmetric grid per output row: ``scale * (q - zero)`` with q from 0 to 2^bits - 1.

    The range of a row is widened to hold 0, which then is a point of the grid: a pruned weight
    stays exactly zero.

    Attributes:
        scale: [out], positive.
        zero: [out], whole numbers.
        bits: width of q.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """[out, in], int64: the nearest q of every weight."""
        return self._codes(weight, self.scale[:, None], self.zero[:, None]).long()

    def round(self, weight: Tensor) -> Tensor:
        """[out, in]: the nearest point of the grid."""
        return self._round(weight, self.scale[:, None], self.zero[:, None])

    def round_column(self, column: Tensor) -> Tensor:
        """[out]: the nearest points for one column."""
        return self._round(column, self.scale, self.zero)

    def _codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (values / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1)

    def _round(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return self._codes(values, scale, zero).sub_(zero).mul_(scale)


def grid(weight: Tensor, bits: int) -> Grid:
    """The grid that spans each row of a dense weight.

    Args:
        weight: [out, in], float32 or float64.
        bits: 2 to 8.

    Raises:
        RecipeError: another number of bits.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(f"weights can't be quantised to {bits} bits", hint="2 to 8 bits")
    low = weight.amin(1).clamp_max(0)
    high = weight.amax(1).clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    # Below the smallest normal number, 1 / scale overflows. Such a row rounds to zero.
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1, scale)
    return Grid(scale, (-low / scale).round(), bits)
