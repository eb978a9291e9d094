"""`block`: the blocks of a matrix that aren't empty, in rows of blocks.

    A . . B     values         [blocks, side, side]   A B C
    . C . .     block_columns  [blocks]               0 3 1
                row_offsets    [rows / side + 1]      0 2 3

A weight takes (share of blocks) * itemsize bytes, and a block four more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .packed import FormatError, check_matrix, check_offsets, check_shape, check_tensor, first

SIDE = 16


@dataclass(frozen=True)
class Block:
    """A packed weight.

    Attributes:
        shape: rows and columns, multiples of the side of a block.
        values: [blocks, side, side], floating-point, in order of rows and then of columns.
        block_columns: [blocks], int32.
        row_offsets: [rows / side + 1], int64, where the blocks of a row of blocks begin.
    """

    format: ClassVar[str] = "block"
    shape: tuple[int, int]
    values: Tensor
    block_columns: Tensor
    row_offsets: Tensor

    @property
    def side(self) -> int:
        """Rows and columns of a block."""
        return int(self.values.shape[-1])

    @classmethod
    def pack(cls, weight: Tensor, side: int = SIDE) -> Self:
        """See `Packed.pack`.

        Args:
            weight: [rows, columns], floating-point.
            side: rows and columns of a block.

        Raises:
            FormatError: The matrix isn't made of such blocks.
        """
        weight = check_matrix(cls.format, weight)
        rows, columns = weight.shape
        if rows % side or columns % side:
            why = f"{rows} x {columns} isn't made of blocks of {side} x {side}"
            raise FormatError(cls.format, "weight", why)
        blocks = weight.view(rows // side, side, columns // side, side).transpose(1, 2)
        kept = (blocks != 0).flatten(2).any(2)
        counts = kept.sum(1)
        values = blocks[kept]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = kept.nonzero()[:, 1].to(torch.int32)
        return cls((rows, columns), values.where(values != 0, 0), place, offsets)

    @classmethod
    def of_tensors(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` returned; `validate` has yet to be called."""
        return cls(shape, tensors["values"], tensors["block_columns"], tensors["row_offsets"])

    def tensors(self) -> dict[str, Tensor]:
        """The parts that a file has to hold beside the shape."""
        return {
            "values": self.values,
            "block_columns": self.block_columns,
            "row_offsets": self.row_offsets,
        }

    def unpack(self) -> Tensor:
        """The dense matrix, [rows, columns], with positive zeros."""
        rows, columns = self.shape
        side = self.side
        dense = self.values.new_zeros(rows // side, columns // side, side, side)
        dense[self.block_rows(), self.block_columns.long()] = self.values
        return dense.transpose(1, 2).reshape(rows, columns)

    def block_rows(self) -> Tensor:
        """[blocks], int64, the row of blocks that each block is in."""
        counts = self.row_offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def validate(self) -> None:
        """Check every index, count and padding."""
        rows, columns = check_shape(self.format, self.shape)
        if self.values.dim() != 3 or not self.side or rows % self.side or columns % self.side:
            why = f"{list(self.values.shape)} are no blocks of a {rows} x {columns} matrix"
            raise FormatError(self.format, "values", why)
        blocks, side = len(self.values), self.side
        check_tensor(self.format, "values", self.values, (blocks, side, side), None)
        check_tensor(self.format, "row_offsets", self.row_offsets, (rows // side + 1,), torch.int64)
        check_tensor(self.format, "block_columns", self.block_columns, (blocks,), torch.int32)
        check_offsets(self.format, self.row_offsets, blocks)
        place = self.block_columns.long()
        at = first((place < 0) | (place >= columns // side))
        if at is not None:
            why = f"{int(place[at])} is outside the matrix"
            raise FormatError(self.format, "block_columns", why, at)
        order = self.block_rows() * (columns // side) + place
        at = first(order.diff() <= 0)
        if at is not None:
            why = "not after the block before it"
            raise FormatError(self.format, "block_columns", why, at + 1)
