"""`nm24`: two values of every four columns, as sparse tensor cores read them.

    columns  0 1 2 3 | 4 5 6 7     bitmask  0x95 (bits 0, 2, 4, 7)
             a . b . | c . . d     values   a b c d

Parts are those of compressed-tensors' ``sparse-24-bitmask``: a group with fewer than two values
keeps zeros in their place, so that both parts have fixed shapes. Columns that fill up the last
eight are empty.

A weight takes itemsize / 2 + 1/8 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .bitmap import Bitmap, bits_of, bytes_of
from .packed import FormatError, check_matrix, check_shape, check_tensor, first

KEPT, GROUP = 2, 4


@dataclass(frozen=True)
class NM24:
    """A packed weight.

    Attributes:
        shape: rows and columns.
        values: [rows, 4 * ceil(columns / 8)], floating-point.
        bitmask: [rows, ceil(columns / 8)], uint8, two bits of every four set.
    """

    format: ClassVar[str] = "nm24"
    shape: tuple[int, int]
    values: Tensor
    bitmask: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack a dense matrix; zeros of either sign are left out."""
        weight = check_matrix(cls.format, weight)
        rows, columns = weight.shape
        groups = torch.nn.functional.pad(weight, (0, -columns % 8)).view(rows, -1, GROUP)
        kept = groups != 0
        at = first(kept.sum(2) > KEPT)
        if at is not None:
            row, group = divmod(at, groups.shape[1])
            why = f"row {row} has more than two values in columns {4 * group} to {4 * group + 3}"
            raise FormatError(cls.format, "weight", why, row * columns + 4 * group)
        # The values first, then as many zeros as are needed, both in order of columns.
        places = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[..., :KEPT].sort(2).values
        mask = torch.zeros_like(kept).scatter_(2, places, True)
        values = groups.gather(2, places)
        values = values.where(values != 0, 0)  # negative zeros are zeros
        return cls((rows, columns), values.flatten(1), bytes_of(mask.flatten(1)))

    @classmethod
    def of_tensors(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` returned; `validate` has yet to be called."""
        return cls(shape, tensors["compressed"], tensors["bitmask"])

    def tensors(self) -> dict[str, Tensor]:
        """See `Packed.tensors`; the names are those of compressed-tensors."""
        return {"compressed": self.values, "bitmask": self.bitmask}

    def as_bitmap(self) -> Bitmap | None:
        """The same parts as a bitmap some of whose values are zero; nothing is copied.

        None where the last eight columns aren't whole: bits of columns that aren't there are set.
        """
        rows, columns = self.shape
        if columns % 8:
            return None
        width = self.values.shape[1]
        offsets = torch.arange(0, rows * width, width, device=self.values.device)
        return Bitmap(self.shape, self.values.flatten(), self.bitmask, offsets)

    def unpack(self) -> Tensor:
        """The dense matrix, [rows, columns], with positive zeros."""
        columns = self.shape[1]
        mask = bits_of(self.bitmask, self.bitmask.shape[1] * 8)
        dense = self.values.new_zeros(mask.shape)
        dense[mask] = self.values.flatten()
        return dense[:, :columns].contiguous()

    def validate(self) -> None:
        """Check every index, count and padding."""
        rows, columns = check_shape(self.format, self.shape)
        width = -(-columns // 8)
        check_tensor(self.format, "bitmask", self.bitmask, (rows, width), torch.uint8)
        check_tensor(self.format, "compressed", self.values, (rows, 4 * width), None)
        mask = bits_of(self.bitmask, width * 8)
        counts = mask.view(rows, -1, GROUP).sum(2)
        at = first(counts != KEPT)
        if at is not None:
            why = f"{int(counts.flatten()[at])} bits of a group of four are set instead of two"
            raise FormatError(self.format, "bitmask", why, at // 2)
        place = torch.arange(width * 8).expand(rows, -1)[mask].view_as(self.values)
        at = first((place >= columns) & (self.values != 0))
        if at is not None:
            raise FormatError(self.format, "compressed", "a value after the last column", at)
