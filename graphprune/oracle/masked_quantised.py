"""Zero in quantised values, for the masked model: it is the zero point, not the integer 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.ir.onnx.shapes.quantised import encodings, scale_names, zero_points

# Narrow types that ONNX Runtime chooses between two tensors of (Where).
_CHOSEN = {ir.DataType.INT8, ir.DataType.UINT8}
_FLOATS = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class Zeros:
    """What stands for zero in the initialisers and the results of a graph.

    Where it isn't known (bytes that several numbers share, integers whose reader isn't known), the
    value is left alone. That is sound: what is computed from it is masked too, and a removed
    coordinate that reaches an output after all makes the comparison fail, not pass.
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Zeros of `graph` as it is, before anything is masked."""
        self._graph = graph
        self._encodings = encodings(graph)
        self._scales = scale_names(graph)
        self._points = zero_points(graph)

    def stored(self, name: str, tensor: ir.TensorProtocol) -> NDArray[Any] | None:
        """Zero in an initialiser, in its type and shape; None where it is to be left alone.

        Scales and zero points are left alone: of the indices that go, nobody reads them.
        """
        encoding = self._encodings.get(name)
        shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
        if encoding is not None:
            if encoding.bits:
                return None
            size = shape[encoding.axis] if shape else 1
            zero = encoding.zero_array(self._graph, size).astype(dtype)
        elif name in self._scales or _is_narrow(tensor.dtype):
            return None
        else:
            zero = np.zeros((), dtype)
        return np.broadcast_to(zero, shape)

    def of(self, name: str, dtype: ir.DataType) -> ir.Value | NDArray[Any] | None:
        """Zero in a result: a value of the graph or a number; None where it isn't known."""
        if _is_narrow(dtype) and (dtype not in _CHOSEN or name not in self._points):
            return None
        point = self._points.get(name)
        return np.zeros((), dtype.numpy()) if point is None else point


def _is_narrow(dtype: ir.DataType) -> bool:
    """Whether a type is one of quantised numbers."""
    return dtype.bitwidth < 32 and dtype != ir.DataType.BOOL and dtype not in _FLOATS
