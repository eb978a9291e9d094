"""Programs of ONNX files, and of ONNX models in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import onnx_ir as ir

from graphprune.analysis.structures import find_structures
from graphprune.frontends.onnx.read import adopt_onnx, read_onnx
from graphprune.ir.onnx.infer import infer_onnx
from graphprune.ir.onnx.program import Initializers, OnnxProgram
from graphprune.ir.onnx.shapes.declared import check_inputs, check_outputs
from graphprune.ir.onnx.shapes.quantised import encodings, scale_names
from graphprune.ir.onnx.shapes.sizes import known_values


def load_onnx(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> OnnxProgram:
    """Open an ONNX file.

    Args:
        path: the file.
        shapes: input name to an example shape, where the usual ones don't fit the model.

    Raises:
        LoadError: see `read_onnx` and `known_values`.
    """
    return analyse(read_onnx(path), shapes, path)


def adopt(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> OnnxProgram:
    """A program of an ONNX model in memory.

    Args:
        model: it stays as it is; the program shares its weights.
        shapes: as for `load_onnx`.

    Raises:
        LoadError: see `adopt_onnx` and `known_values`.
    """
    return analyse(adopt_onnx(model), shapes, None)


def analyse(
    model: ir.Model, shapes: Mapping[str, Sequence[int]] | None, path: Path | None
) -> OnnxProgram:
    """The program of a model in the form that `read_onnx` gives.

    Raises:
        LoadError: see `known_values`, `check_inputs` and `check_outputs`.
    """
    check_inputs(model)
    known = known_values(model, shapes)
    check_outputs(model, known)
    found, scales = encodings(model.graph), scale_names(model.graph)
    program = OnnxProgram(
        weights=Initializers(model.graph, found),
        aliases={},
        typing=infer_onnx(model, known),
        trainable=frozenset(
            name
            for name in model.graph.initializers
            if prod(known[name].shapes[0]) > 1
            and (name in found or (known[name].dtype.is_floating_point() and name not in scales))
        ),
        path=path,
        model=model,
        known=known,
        encodings=found,
    )
    program.structures = find_structures(program, program.costs)
    return program
