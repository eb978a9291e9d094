"""Samples for a program of either kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.calibration import batches as torch_data
from graphprune.calibration.batches import Batch
from graphprune.calibration.onnx_batches import onnx_batches

_TOKENS = 2048
"""Tokens of a batch, about: more don't make its products quicker."""

_FEWEST = 16
"""Batches that there are at least, as far as there are samples: repairs compare halves of them."""

_BATCHES: Mapping[GraphFormat, Callable[[Any, Any, int], list[Batch]]] = {
    "torch": torch_data.batches,
    "onnx": onnx_batches,
}


def batches(program: BaseProgram, data: Any, batch: int | None = None) -> list[Batch]:
    """Samples in the form that a program takes.

    See `graphprune.calibration.batches.batches`, and
    `graphprune.calibration.onnx_batches.onnx_batches`. Without `batch`, windows of tokens go
    through together, the more the shorter they are.
    """
    if callable(data) and not isinstance(data, Tensor | Mapping | Batch | np.ndarray):
        data = data()
    if batch is None:
        batch = _suited(program, data)
    return _BATCHES[program.format](program, data, batch)


def _suited(program: BaseProgram, data: Any) -> int:
    """How many samples to run at a time: a call of an operator costs more than a few rows do."""
    tensors = list(data.values()) if isinstance(data, Mapping) else [data]
    shapes = {tuple(getattr(t, "shape", ())) for t in tensors}
    if len(shapes) != 1 or any(i.shape[:1] != (None,) for i in program.signature()):
        return 1
    (shape,) = shapes
    if len(shape) != 2 or any("int" not in str(t.dtype) for t in tensors):
        return 1
    count, length = shape
    most = max(1, min(_TOKENS // max(length, 1), count // _FEWEST))
    # A rest would be of another size: halves of the samples wouldn't be equal, and some runs take
    # one size only.
    return max(size for size in range(1, most + 1) if count % size == 0)
