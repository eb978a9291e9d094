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
from graphprune.frontends.onnx_data import bind_data, check, check_elements
from graphprune.ops.onnx_schemas import register_schemas

OLDEST_OPSET = 11


def read_onnx(path: Path) -> ir.Model:
    """Open an ONNX file.

    Args:
        path: the file; see `graphprune.frontends.onnx_data` for where its external data may lie.

    Returns:
        The model, without functions and Constant operators, in topological order.

    Raises:
        LoadError: the file or its data is missing, damaged, invalid, of another opset, or not to
            be trusted.
    """
    if not path.is_file():
        raise LoadError("no such file", where=str(path))
    register_schemas()
    try:
        proto = onnx.load(path, load_external_data=False)
        model = ir.from_proto(proto)
    except Exception as error:  # a damaged file surfaces as many kinds of error
        root = _root(error)
        raise LoadError(
            "the file is no ONNX model that can be read",
            where=str(path),
            why=f"{type(root).__name__}: {str(root).strip()[:300]}",
            hint="export it again",
        ) from error
    _check_opset(model, path)
    bind_data(model, path)
    try:
        check(proto, path)
        check_elements(model)
        _normalise(model)
    except Exception as error:  # as above
        raise LoadError(
            "the ONNX model is not valid", where=str(path), why=str(_root(error)).strip()[:500]
        ) from error
    _check_use(model, path)
    return model


def _root(error: BaseException) -> BaseException:
    """The first of the errors that led to one."""
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None:
            return error
        error = earlier


def adopt_onnx(model: ir.Model) -> ir.Model:
    """Bring a model in memory into the form that `read_onnx` gives.

    Args:
        model: in topological order; it stays as it is.

    Returns:
        A copy, which shares the weights.

    Raises:
        LoadError: the model is invalid, of another opset, or has an initialiser without data.
    """
    register_schemas()
    where = f"model {model.graph.name}" if model.graph.name else "a model in memory"
    _check_opset(model, where)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise LoadError("an initialiser has no data", where=f"{where}, {name}")
    try:
        adopted = model.clone()
        passes.CheckerPass()(adopted)  # it takes large weights out for the time of the check
        _normalise(adopted)
    except Exception as error:  # as above
        raise LoadError(
            "the ONNX model is not valid", where=where, why=str(_root(error)).strip()[:500]
        ) from error
    _check_use(adopted, where)
    return adopted


def _check_use(model: ir.Model, where: Path | str) -> None:
    if not model.graph.outputs:
        raise LoadError("the ONNX model has no outputs", where=str(where))


def _check_opset(model: ir.Model, where: Path | str) -> None:
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise LoadError(
            f"opset {version} is not supported",
            where=str(where),
            why=f"graphprune reads opset {OLDEST_OPSET} to {newest}",
            hint="convert it with onnx.version_converter, or export it again",
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
