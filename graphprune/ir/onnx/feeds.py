"""Random inputs of ONNX models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.analysis.workload import Workload
from graphprune.errors import VerifyError
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.shapes.lengths import lengths_for
from graphprune.ir.onnx.signature import index_bound
from graphprune.ir.onnx.workload import known_at


def random_feeds(program: OnnxProgram, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random inputs of the first example's shapes; indices are within what they point into."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for value in program.model.graph.inputs:
        name = value.name or ""
        known = program.known.get(name)
        if known is None:
            raise VerifyError(
                "no random input can be made",
                where=f"input {name}",
                why=f"it is no tensor but {value.type}",
                hint="verify with inputs of your own: graphprune.verify(..., inputs={name: value})",
            )
        shape, dtype = known.shapes[0], known.dtype.numpy()
        if known.dtype == ir.DataType.STRING:
            feeds[name] = np.full(shape, "text", dtype=object)
        elif known.dtype.is_floating_point():
            feeds[name] = rng.standard_normal(shape).astype(dtype)
        elif (lengths := lengths_for(value, program.known)) is not None:
            feeds[name] = lengths.astype(dtype)
        else:
            bound = index_bound(program.known, value)
            feeds[name] = rng.integers(0, 2 if bound is None else bound, shape).astype(dtype)
    return feeds


def feeds_at(program: OnnxProgram, workload: Workload) -> dict[str, NDArray[Any]]:
    """Random inputs of an ONNX model of the sizes of a call."""
    known = known_at(program.model, program.known, workload)
    return random_feeds(replace(program, known=dict(known)))
