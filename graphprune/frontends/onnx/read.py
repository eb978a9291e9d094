"""Front end for ONNX files: read, check and bring into one form.

Functions are inlined and constants of every kind become initialisers, so that what follows meets
one graph of operators. Initialisers are constants, also where they are listed as inputs. Weights
stay in the file, mapped into memory.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import PassManager
from onnx_ir.passes import common as passes

from graphprune.errors import LoadError
from graphprune.files.paths import usable
from graphprune.frontends.onnx.data import bind_data, check, check_elements
from graphprune.frontends.onnx.functions import check_extent
from graphprune.frontends.onnx.names import check_text
from graphprune.frontends.onnx.packed import unpack_products
from graphprune.ir.onnx.shapes.quantised import scale_names
from graphprune.ops.onnx.schemas import register_schemas

OLDEST_OPSET = 11

# Before this version of the format every initialiser had to be an input as well.
CONSTANT_INITIALISERS = 4

# The first input that is a scale or bias, of operators that have such.
_AFFINE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), 0),
    **dict.fromkeys(("PRelu", "BatchNormalization", "InstanceNormalization"), 1),
    **dict.fromkeys(("GroupNormalization", "LayerNormalization", "RMSNormalization"), 1),
    **dict.fromkeys(("SimplifiedLayerNormalization", "BiasGelu", "FastGelu"), 1),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), 2),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "FusedConv", "FusedGemm"), 2),
}


def read_onnx(path: Path) -> ir.Model:
    """Open an ONNX file.

    Args:
        path: the file; see `graphprune.frontends.onnx.data` for where its external data may lie.

    Returns:
        The model, without functions and Constant operators, in topological order.

    Raises:
        LoadError: the file or its data is missing, damaged, invalid, of another opset, or not to
            be trusted.
    """
    if not usable(path).is_file():
        raise LoadError("no such file", where=str(path))
    register_schemas()
    try:
        proto = onnx.load(path, load_external_data=False)
        check_text(proto, path)
        model = ir.from_proto(proto)
    except LoadError:
        raise
    except Exception as error:  # a damaged file surfaces as many kinds of error
        root = _root(error)
        raise LoadError(
            "the file is no ONNX model that can be read",
            where=str(path),
            why=f"{type(root).__name__}: {str(root).strip()[:300]}",
            hint="export it again",
        ) from error
    _check_opset(model, path)
    check_extent(model, path)
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
    check_extent(model, where)
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
    model.ir_version = max(model.ir_version, CONSTANT_INITIALISERS)
    inlined = {domain for domain, _, _ in model.functions}
    unpack_products(model)
    PassManager(
        [
            passes.InlinePass(),
            passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.LiftSubgraphInitializersToMainGraphPass(),
            passes.RemoveInitializersFromInputsPass(),
            passes.TopologicalSortPass(),
            passes.RemoveUnusedNodesPass(),
        ]
    )(model)
    for domain in inlined - {node.domain for node in model.graph.all_nodes()}:
        model.opset_imports.pop(domain, None)
    _part_vectors(model.graph)


def _part_vectors(graph: ir.Graph) -> None:
    """Give every reader of a scale or bias one of its own.

    Exporters merge initialisers of equal values: the biases of layers that have nothing else to do
    with each other, if they are zero. As one they would have to be cut alike. Matrices stay
    shared, since those that are equal are tied, and so does what a weight is computed from.
    """
    described = scale_names(graph)
    computed = set(graph.inputs)
    for node in graph:
        if not computed.isdisjoint(node.inputs):
            computed.update(node.outputs)
    taken = {v.name for node in graph.all_nodes() for v in (*node.inputs, *node.outputs) if v}
    for name, value in list(graph.initializers.items()):
        tensor, uses = value.const_value, list(value.uses())
        if tensor is None or not tensor.dtype.is_floating_point() or name in described:
            continue
        if tensor.size < 2 or tensor.size != max(tensor.shape.numpy()):
            continue
        if not all(_is_affine(node, place) and node.outputs[0] in computed for node, place in uses):
            continue
        for number, (node, place) in enumerate(uses[1:], 2):
            own = f"{name}_{number}"
            while own in taken:
                own += "_"
            taken.add(own)
            node.replace_input_with(place, ir.tape.Tape(graph).initializer(tensor, own))


def _is_affine(node: ir.Node, place: int) -> bool:
    """Whether an input of an operator is a scale, or is added."""
    return place >= _AFFINE.get(node.op_type, len(node.inputs))
