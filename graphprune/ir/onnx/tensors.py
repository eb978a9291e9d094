"""Tensors of ONNX models that never lie in memory as a whole: read, cut and written in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

# Bytes that are cut and written at a time.
PIECE = 1 << 22
# Smaller tensors are read; mapping each of them would take a mapping of the process each.
MAPPED_ABOVE = 1 << 16


class Mapped(ir.ExternalTensor):
    """A tensor in a file that `graphprune.frontends.onnx.data` has let pass.

    What `numpy` gives is mapped anew each time, and with it the memory goes. Writing to it changes
    a copy of the page.
    """

    def __init__(self, tensor: ir.ExternalTensor, file: Path) -> None:
        """The data of `tensor` at `file`, an absolute path."""
        super().__init__(
            str(file),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name,
            doc_string=tensor.doc_string,
        )

    def numpy(self) -> Array:
        """The elements, of the tensor's type and shape."""
        shape = tuple(self.shape.numpy())
        if self.dtype.bitwidth < 8:  # packed: several elements a byte
            packed = ir.ExternalTensor(
                self.location, self.offset, self.length, self.dtype, shape=self.shape, name="packed"
            )
            return packed.numpy()
        dtype = np.dtype(self.dtype.numpy()).newbyteorder("<")
        offset = self.offset or 0
        if self.nbytes > MAPPED_ABOVE:
            return np.memmap(self.path, dtype, "c", offset, shape)
        return np.fromfile(self.path, dtype, prod(shape), offset=offset).reshape(shape)

    def __array__(self, dtype: Any = None) -> Array:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        """The bytes as the file has them."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.nbytes)


class Streamed(ir.LazyTensor):
    """A tensor that is computed from another one when it is written, some rows at a time."""

    def __init__(
        self,
        source: ir.TensorProtocol,
        rows: Callable[[Array, int, int], Array],
        shape: Sequence[int],
        name: str | None,
    ) -> None:
        """A tensor of the type of `source`.

        Args:
            source: what it is computed from.
            rows: given the elements of `source`, the result from one row to before another; rows
                are along the first dimension.
            shape: of the result, which is no scalar.
            name: of the result.
        """
        self._source = source
        self._rows = rows
        super().__init__(self._whole, source.dtype, ir.Shape(shape), name=name)

    def _whole(self) -> ir.TensorProtocol:
        elements = self._rows(np.asarray(self._source.numpy()), 0, self.shape.numpy()[0])
        return ir.Tensor(np.ascontiguousarray(elements), dtype=self.dtype, name=self.name)

    def tofile(self, file: IO[bytes]) -> None:
        """Write the elements, in pieces of about `PIECE` bytes."""
        if self.dtype.bitwidth < 8:  # packed: rows need not end at a byte
            super().tofile(file)
            return
        elements = np.asarray(self._source.numpy())
        count = self.shape.numpy()[0]
        step = max(1, PIECE * count // max(1, self.nbytes))
        for start in range(0, count, step):
            piece = self._rows(elements, start, min(start + step, count))
            ir.Tensor(np.ascontiguousarray(piece), dtype=self.dtype).tofile(file)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initialisers of a model, of those of inner graphs too."""
    values = (v for graph in model.graphs() for v in graph.initializers.values())
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)
