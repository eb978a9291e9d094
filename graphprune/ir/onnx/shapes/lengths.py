"""Model inputs that attention with a cache reads lengths from: which values make sense in them.

ONNX Runtime refuses lengths that don't fit the sizes of its other operands, so that random numbers
can't stand for a mask of tokens, for positions, or for lengths themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.ir.onnx.shapes.sizes import Known, qualified

_GROUPED = "com.microsoft.GroupQueryAttention"
_LAST, _TOTAL = 5, 6  # its inputs: the place of the last token of each sequence, the total length
_COUNTED, _LARGEST = "ReduceSum", "ReduceMax"
_ON_THE_WAY = {
    "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Add", "Sub", _COUNTED, _LARGEST,
}  # fmt: skip


def lengths_for(value: ir.Value, known: Mapping[str, Known]) -> NDArray[np.int64] | None:
    """What a model input has to hold for the lengths that are computed from it to fit.

    Args:
        value: an input of integers.
        known: what is known about the values of the graph.

    Returns:
        An array of the input's shape in the first example: a mask of ones where its elements are
        counted, consecutive places where their largest is taken, else the length itself; None
        for an input that no length depends on.
    """
    waiting: list[tuple[ir.Value, str]] = [(value, "")]
    seen = set()
    while waiting:
        current, reduction = waiting.pop()
        for use in current.uses():
            node = use.node
            if qualified(node) == _GROUPED and use.idx in (_LAST, _TOTAL):
                shape = known[value.name or ""].shapes[0]
                return _fitting(node, use.idx, reduction, shape, known)
            if node.op_type in _ON_THE_WAY and node not in seen:
                seen.add(node)
                reduced = node.op_type in (_COUNTED, _LARGEST) and not reduction
                waiting.extend((v, node.op_type if reduced else reduction) for v in node.outputs)
    return None


def _fitting(
    node: ir.Node,
    position: int,
    reduction: str,
    shape: tuple[int, ...],
    known: Mapping[str, Known],
) -> NDArray[np.int64] | None:
    before, now = _length(node, 3, 2, known), _length(node, 1, 1, known)
    now = now or _length(node, 0, 1, known)
    if reduction == _COUNTED:
        return np.ones(shape, np.int64)
    if reduction == _LARGEST:
        places = np.arange(before, before + shape[-1] if shape else before)
        return np.broadcast_to(places, shape).astype(np.int64)
    return np.full(shape, before + now - (position == _LAST), np.int64)


def _length(node: ir.Node, position: int, axis: int, known: Mapping[str, Known]) -> int:
    """A size of an input; 0 where it isn't there."""
    value = node.inputs[position] if position < len(node.inputs) else None
    found = None if value is None else known.get(value.name or "")
    return 0 if found is None else found.shapes[0][axis]
