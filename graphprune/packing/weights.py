"""In which format a weight is stored."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from graphprune.kernels.choose import DENSE, Table, choose
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.formats.files import FORMATS
from graphprune.kernels.formats.packed import DTYPES, FormatError, Packed, nbytes
from graphprune.packing.report import Layer
from graphprune.runtime.formats import AUTO

_COLUMNS = 256


def packed_weight(
    name: str, weight: Tensor, format: str, tokens: tuple[int, ...], table: Table | None
) -> tuple[Layer, Packed | None]:
    """Pack a weight if that pays.

    Args:
        name: of the weight.
        weight: [outputs, inputs].
        format: a name, or ``auto`` for what is the fastest.
        tokens: for ``auto``.
        table: for ``auto``, times that were measured before.

    Returns:
        What became of it, and the packed weight; None where it stays dense.
    """
    dense = weight.numel() * weight.element_size()
    rows, columns = weight.shape
    known = weight.dtype in DTYPES and dense
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel() if known else 0.0

    def left(why: str) -> tuple[Layer, None]:
        return Layer(name, (rows, columns), sparsity, DENSE, dense, dense, why), None

    if not known:
        return left(f"values of type {weight.dtype}" if dense else "empty")
    if sparsity == 0:
        return left("no zeros")
    chosen = choose(weight, tokens, table=table) if format == AUTO else format
    if chosen == DENSE:
        return left("a dense product is faster here")
    try:
        packed = FORMATS[chosen].pack(weight)
    except FormatError as error:
        return left(str(error) if format != AUTO else error.why)
    if format != AUTO and nbytes(packed) >= dense:
        return left("not smaller")
    return Layer(name, (rows, columns), sparsity, chosen, dense, nbytes(packed)), packed


def packed_tensor(name: str, tensor: Tensor) -> tuple[Layer, Packed | None]:
    """Pack a tensor that is dense when it computes, such as experts, for the file to be smaller.

    Args:
        name: of the tensor.
        tensor: of any shape.

    Returns:
        What became of it, and a bitmap of the matrix of its last sizes; None where it stays dense.
    """
    columns, left = 1, list(tensor.shape)
    while len(left) > 1 and columns < _COLUMNS:  # rows have costs of their own
        columns *= left.pop()
    layer, packed = packed_weight(
        name, tensor.reshape(-1, max(columns, 1)), Bitmap.format, (), None
    )
    return (layer if packed is None else replace(layer, why="dense when it computes")), packed
