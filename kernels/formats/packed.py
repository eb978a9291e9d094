"""What all sparse formats have in common, and their files.

A packed weight is a frozen dataclass of tensors. It stands for a matrix of the shape [out, in] that
a linear layer multiplies tokens with, y = x W^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


class FormatError(ValueError):
    """A packed weight contradicts itself, or a weight doesn't fit a format.

    Attributes:
        format: of which format.
        field: which tensor of it.
        offset: where in the flattened tensor; None where that makes no sense.
        why: what is wrong there.
    """

    def __init__(self, format: str, field: str, why: str, offset: int | None = None) -> None:
        place = field if offset is None else f"{field}[{offset}]"
        super().__init__(f"{format}: {place}: {why}")
        self.format, self.field, self.offset, self.why = format, field, offset, why


@runtime_checkable
class Packed(Protocol):
    """A weight in a sparse format.

    Attributes:
        format: name of the format.
    """

    format: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of the matrix."""
        ...

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack a dense matrix; zeros of either sign are left out.

        Args:
            weight: [rows, columns], floating-point.

        Raises:
            FormatError: The format can't hold it.
        """
        ...

    @classmethod
    def of_tensors(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` returned; `validate` has yet to be called."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The parts that a file has to hold beside the shape."""
        ...

    def unpack(self) -> Tensor:
        """The dense matrix, [rows, columns], with positive zeros."""
        ...

    def validate(self) -> None:
        """Check every index, count and padding.

        Raises:
            FormatError: Something is wrong; the first place is named.
        """
        ...


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What values may be."""


def nbytes(packed: Packed) -> int:
    """Bytes of all parts."""
    return sum(t.numel() * t.element_size() for t in packed.tensors().values())


def check_matrix(format: str, weight: Tensor) -> Tensor:
    """A weight to pack, contiguous and without gradients.

    Raises:
        FormatError: It isn't a matrix of one of `DTYPES`, or it is empty.
    """
    if weight.dim() != 2:
        raise FormatError(format, "weight", f"a matrix is needed, not {weight.dim()} dimensions")
    if weight.dtype not in DTYPES:
        raise FormatError(format, "weight", f"{weight.dtype} isn't a floating-point type we know")
    if not weight.numel():
        raise FormatError(format, "weight", "the matrix is empty")
    return weight.detach().contiguous()


def check_tensor(
    format: str, field: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """Check a part of a packed weight; a dtype of None stands for any floating-point one.

    Raises:
        FormatError: Its shape or type is another one.
    """
    if tuple(tensor.shape) != shape:
        why = f"the shape is {list(tensor.shape)} instead of {list(shape)}"
        raise FormatError(format, field, why)
    fits = tensor.dtype == dtype if dtype else tensor.dtype in DTYPES
    if not fits:
        raise FormatError(
            format, field, f"the type is {tensor.dtype}, not {dtype or 'a floating-point one'}"
        )
    if not tensor.is_contiguous():
        raise FormatError(format, field, "not contiguous")


def first(wrong: Tensor) -> int | None:
    """Place of the first True in a flattened tensor, if there is one."""
    flat = wrong.flatten()
    return int(flat.to(torch.uint8).argmax()) if flat.any() else None


def check_offsets(format: str, offsets: Tensor, total: int) -> None:
    """Check offsets that begin with 0, never fall and end with `total`.

    Raises:
        FormatError: One is wrong.
    """
    at = first((offsets < 0) | (offsets > total))
    if at is not None:
        why = f"{int(offsets[at])} is none of 0 to {total}"
        raise FormatError(format, "row_offsets", why, at)
    if int(offsets[0]):
        raise FormatError(format, "row_offsets", f"begins with {int(offsets[0])}", 0)
    at = first(offsets[1:] < offsets[:-1])
    if at is not None:
        raise FormatError(format, "row_offsets", "smaller than the one before", at + 1)
    if int(offsets[-1]) != total:
        why = f"ends with {int(offsets[-1])}, there are {total}"
        raise FormatError(format, "row_offsets", why, len(offsets) - 1)


def check_shape(format: str, shape: Any) -> tuple[int, int]:
    """Rows and columns, as read from a file.

    Raises:
        FormatError: They aren't two positive numbers.
    """
    try:
        found = tuple(int(s) for s in shape)
    except (ValueError, OverflowError) as error:
        raise FormatError(format, "shape", f"{list(shape)} isn't a shape") from error
    if len(found) != 2 or min(found) < 1 or found[0] * found[1] >= 2**48:
        raise FormatError(format, "shape", f"{list(found)} isn't the shape of a matrix")
    return found[0], found[1]
