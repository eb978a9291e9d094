"""`bitmap`: one bit per weight, and the values of those that are set.

    row 0   1 0 0 1 1 0 0 0 | 0 1     bitmask  [rows, ceil(columns / 8)]  0x19 0x02
            a     b c           d     values   [nonzeros]                 a b c d ...
                                      row_offsets [rows]                  0 4 ...

Bit i of byte j stands for column 8 j + i. Rows begin at full bytes; the bits after the last column
are zero. Values are in row-major order, and `row_offsets` says where those of a row begin. The
parts are byte for byte those of compressed-tensors' format ``sparse-bitmask``.

A weight takes (1 - sparsity) * itemsize + 1/8 bytes, and a row 8 more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .packed import FormatError, check_matrix, check_shape, check_tensor, first

ROWS = 4096  # that are packed at a time: bounds the memory for indices


@dataclass(frozen=True)
class Bitmap:
    """A packed weight.

    Attributes:
        shape: rows and columns.
        values: [nonzeros], floating-point, row-major.
        bitmask: [rows, ceil(columns / 8)], uint8, the least significant bit first.
        row_offsets: [rows], int64, where the values of a row begin.
    """

    format: ClassVar[str] = "bitmap"
    shape: tuple[int, int]
    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack a dense matrix; zeros of either sign are left out."""
        weight = check_matrix(cls.format, weight)
        counts, masks, values = [], [], []
        for part in torch.split(weight, ROWS):
            kept = part != 0
            counts.append(kept.sum(1))
            masks.append(bytes_of(kept))
            values.append(part[kept])
        count = torch.cat(counts)
        rows, columns = weight.shape
        offsets = count.cumsum(0) - count
        return cls((rows, columns), torch.cat(values), torch.cat(masks), offsets)

    @classmethod
    def of_tensors(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` returned; `validate` has yet to be called."""
        return cls(shape, tensors["compressed"], tensors["bitmask"], tensors["row_offsets"])

    def tensors(self) -> dict[str, Tensor]:
        """See `Packed.tensors`; the names are those of compressed-tensors."""
        return {
            "compressed": self.values,
            "bitmask": self.bitmask,
            "row_offsets": self.row_offsets,
        }

    def unpack(self) -> Tensor:
        """The dense matrix, [rows, columns], with positive zeros."""
        rows, columns = self.shape
        dense = self.values.new_zeros(rows, columns)
        begin = 0
        for part, masks in zip(
            torch.split(dense, ROWS), torch.split(self.bitmask, ROWS), strict=True
        ):
            kept = bits_of(masks, columns)
            count = int(kept.sum())
            part[kept] = self.values[begin : begin + count]
            begin += count
        return dense

    def validate(self) -> None:
        """Check every index, count and padding."""
        rows, columns = check_shape(self.format, self.shape)
        width = -(-columns // 8)
        check_tensor(self.format, "bitmask", self.bitmask, (rows, width), torch.uint8)
        check_tensor(self.format, "row_offsets", self.row_offsets, (rows,), torch.int64)
        if columns % 8:
            at = first((self.bitmask[:, -1] >> (columns % 8)) != 0)
            if at is not None:
                raise FormatError(
                    self.format,
                    "bitmask",
                    f"bits after column {columns - 1} are set",
                    at * width + width - 1,
                )
        counts = torch.cat([bits_of(m, columns).sum(1) for m in torch.split(self.bitmask, ROWS)])
        expected = counts.cumsum(0) - counts
        at = first(self.row_offsets != expected)
        if at is not None:
            why = f"{int(self.row_offsets[at])} instead of {int(expected[at])}, by the bits before"
            raise FormatError(self.format, "row_offsets", why, at)
        check_tensor(self.format, "compressed", self.values, (int(counts.sum()),), None)


def bytes_of(kept: Tensor) -> Tensor:
    """Bits as bytes.

    Args:
        kept: [rows, columns], bool.

    Returns:
        [rows, ceil(columns / 8)], uint8, the least significant bit first.
    """
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8)).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=kept.device)
    return (padded.view(len(padded), -1, 8) * weights).sum(2, dtype=torch.uint8)


def bits_of(masks: Tensor, columns: int) -> Tensor:
    """The inverse of `bytes_of`: [rows, columns], bool."""
    places = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks[..., None] >> places) & 1).flatten(1)[:, :columns].bool()
