"""`csr`: compressed sparse rows, for what the vendor's library reads; the most bytes per value.

A weight takes (1 - sparsity) * (itemsize + 4) bytes, and a row 4 more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .packed import FormatError, check_matrix, check_offsets, check_shape, check_tensor, first


@dataclass(frozen=True)
class CSR:
    """A packed weight.

    Attributes:
        shape: rows and columns.
        values: [nonzeros], floating-point, row-major.
        columns: [nonzeros], int32, ascending within a row.
        row_offsets: [rows + 1], int32, where the values of a row begin.
    """

    format: ClassVar[str] = "csr"
    shape: tuple[int, int]
    values: Tensor
    columns: Tensor
    row_offsets: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack a dense matrix; zeros of either sign are left out."""
        weight = check_matrix(cls.format, weight)
        rows, columns = weight.shape
        kept = weight != 0
        counts = kept.sum(1)
        if int(counts.sum()) >= 2**31:
            raise FormatError(cls.format, "weight", "2^31 values or more don't fit 32-bit offsets")
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        return cls((rows, columns), weight[kept], kept.nonzero()[:, 1].to(torch.int32), offsets)

    @classmethod
    def of_tensors(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` returned; `validate` has yet to be called."""
        return cls(shape, tensors["values"], tensors["columns"], tensors["row_offsets"])

    def tensors(self) -> dict[str, Tensor]:
        """The parts that a file has to hold beside the shape."""
        return {"values": self.values, "columns": self.columns, "row_offsets": self.row_offsets}

    def unpack(self) -> Tensor:
        """The dense matrix, [rows, columns], with positive zeros."""
        dense = self.values.new_zeros(self.shape)
        dense[self._rows(), self.columns.long()] = self.values
        return dense

    def _rows(self) -> Tensor:
        counts = self.row_offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def validate(self) -> None:
        """Check every index, count and padding."""
        rows, columns = check_shape(self.format, self.shape)
        check_tensor(self.format, "row_offsets", self.row_offsets, (rows + 1,), torch.int32)
        count = self.values.numel()
        check_tensor(self.format, "values", self.values, (count,), None)
        check_tensor(self.format, "columns", self.columns, (count,), torch.int32)
        check_offsets(self.format, self.row_offsets, count)
        at = first((self.columns < 0) | (self.columns >= columns))
        if at is not None:
            why = f"{int(self.columns[at])} is outside the matrix"
            raise FormatError(self.format, "columns", why, at)
        order = self._rows() * columns + self.columns
        at = first(order.diff() <= 0)
        if at is not None:
            raise FormatError(self.format, "columns", "not after the one before it", at + 1)
