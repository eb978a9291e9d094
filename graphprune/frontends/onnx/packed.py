"""Products with packed weights, which `graphprune pack` puts into ONNX files, made dense again.

So a packed file is a model as any other: it can be inspected, pruned further and packed again. Left
to their function bodies, weights would be what the decoding computes, and nothing could be pruned.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from graphprune.errors import LoadError
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.formats.packed import FormatError
from graphprune.kernels.onnx_function import DOMAIN, INPUTS, NAME, VERSION


def unpack_products(model: ir.Model) -> None:
    """Replace nodes ``graphprune::BitmapLinear`` of the main graph by MatMul of dense matrices.

    A node whose weight isn't constant stays, and means what its function says.

    Args:
        model: changed in place.

    Raises:
        LoadError: a weight contradicts itself, or is of another version.
    """
    graph = model.graph
    nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, NAME)]
    if not nodes:
        return
    version = graph.opset_imports.get(DOMAIN, VERSION)
    if version != VERSION:
        raise LoadError(
            f"packed weights of version {version} can't be read",
            why=f"this graphprune knows version {VERSION}",
            hint="use the graphprune that packed the file",
        )
    dense: dict[tuple[ir.Value, ...], ir.Value] = {}
    for node in nodes:
        x, *values = node.inputs
        parts = [v for v in values if v is not None and v.is_initializer()]
        parts = [v for v in parts if v.const_value is not None]
        if len(parts) != len(INPUTS) - 1 or len(values) != len(parts):
            continue
        key = tuple(parts)
        if key not in dense:
            dense[key] = _register(graph, parts)
        product = ir.node("MatMul", [x, dense[key]], name=node.name)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [product], node.outputs, product.outputs
        )
    for key in dense:
        for part in key:
            if part.name is not None and not part.uses():
                graph.initializers.pop(part.name, None)
    if not any((n.domain, n.op_type) == (DOMAIN, NAME) for n in graph.all_nodes()):
        model.functions.pop((DOMAIN, NAME, ""), None)
        graph.opset_imports.pop(DOMAIN, None)


def _register(graph: ir.Graph, parts: list[ir.Value]) -> ir.Value:
    """An initialiser [inputs, outputs] with the numbers of a packed weight."""
    names = INPUTS[1:]
    arrays = {n: v.const_value.numpy() for n, v in zip(names, parts, strict=True)}  # type: ignore[union-attr]
    values = np.array(arrays["compressed"])
    name = str(parts[names.index("bitmask")].name).removesuffix(".bitmask")
    short = values.dtype.kind not in "f"  # bfloat16, which numpy doesn't know
    tensor = torch.from_numpy(values.view(np.int16) if short else values)
    shape = arrays["shape"].tolist()
    try:
        if len(shape) != 2:
            raise FormatError(Bitmap.format, "shape", f"{len(shape)} sizes instead of two")
        packed = Bitmap(
            (int(shape[0]), int(shape[1])),
            values=tensor.view(torch.bfloat16) if short else tensor,
            bitmask=torch.from_numpy(np.array(arrays["bitmask"])),
            row_offsets=torch.from_numpy(np.array(arrays["row_offsets"])),
        )
        packed.validate()
    except FormatError as error:
        raise LoadError(
            "a packed weight contradicts itself", where=name, why=str(error),
            hint="pack the model again",
        ) from error  # fmt: skip
    matrix = packed.unpack().T.contiguous()
    array = matrix.view(torch.int16).numpy().view(values.dtype) if short else matrix.numpy()
    while name in graph.initializers:
        name += "_"
    dtype = parts[0].const_value.dtype  # type: ignore[union-attr]
    return ir.tape.Tape(graph).initializer(ir.tensor(array, dtype=dtype, name=name))
