"""Front end for ONNX files: read, check and bring into one form.

Functions are inlined and constants of every kind become initialisers, so that what follows meets
one graph of operators. Weights stay in the file, mapped into memory.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import PassManager
from onnx_ir.passes import common as passes

from graphprune.errors import LoadError

OLDEST_OPSET = 11


def read_onnx(path: Path) -> ir.Model:
    """Open an ONNX file.

    Args:
        path: the file; its external data lies in the same folder or below.

    Returns:
        The model, without functions and Constant operators, in topological order.

    Raises:
        LoadError: the file or its data is missing, damaged, invalid or of another opset, or its
            data lies outside of its folder.
    """
    if not path.is_file():
        raise LoadError("no such file", where=str(path))
    try:
        model = ir.load(path)
    except Exception as error:  # a damaged file surfaces as many kinds of error
        raise LoadError(
            "the file is no ONNX model",
            where=str(path),
            why=f"{type(error).__name__}: {str(error)[:300]}",
            hint="export it again",
        ) from error
    _check_opset(model, path)
    _check_data(model, path)
    try:
        onnx.checker.check_model(str(path))
        _normalise(model)
    except Exception as error:  # as above
        raise LoadError(
            "the ONNX model is not valid", where=str(path), why=str(error).strip()[:500]
        ) from error
    return model


def _check_opset(model: ir.Model, path: Path) -> None:
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise LoadError(
            f"opset {version} is not supported",
            where=str(path),
            why=f"graphprune reads opset {OLDEST_OPSET} to {newest}",
            hint="convert it with onnx.version_converter, or export it again",
        )


def _check_data(model: ir.Model, path: Path) -> None:
    """External data has to be there in full, in the folder of the model or below it."""
    folder = path.resolve().parent
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            file = (folder / tensor.location).resolve()
            if not file.is_relative_to(folder):
                why = f"{tensor.location!r} lies outside of the model's folder"
            elif not file.is_file():
                why = f"{tensor.location!r} is missing"
            elif file.stat().st_size < (tensor.offset or 0) + (tensor.length or tensor.nbytes):
                why = f"{tensor.location!r} is truncated"
            else:
                continue
            raise LoadError(
                "the model's external data can't be read",
                where=f"{path}, tensor {value.name}",
                why=why,
                hint="copy the data file to the folder of the model",
            )


def _normalise(model: ir.Model) -> None:
    PassManager(
        [
            passes.InlinePass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.LiftSubgraphInitializersToMainGraphPass(),
            passes.RemoveInitializersFromInputsPass(),
            passes.TopologicalSortPass(),
            passes.RemoveUnusedNodesPass(),
        ]
    )(model)
