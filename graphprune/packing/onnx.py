"""ONNX files with packed weights.

A product with a constant matrix becomes a node ``graphprune::BitmapLinear``, which the file also
defines as a function of standard operators. ONNX Runtime takes our kernel where its library is
registered (`graphprune.runtime.session` does that) and the function where it isn't; that one is
computed once, when the file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphprune.errors import EmitError
from graphprune.files import Claim
from graphprune.files.refusals import check_space
from graphprune.frontends.onnx.read import read_onnx
from graphprune.ir.onnx.files import EXTERNAL_ABOVE, data_of, write_checked
from graphprune.ir.onnx.tensors import weight_bytes
from graphprune.kernels.choose import DENSE, Table
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.formats.packed import nbytes
from graphprune.kernels.onnx_function import (
    DOMAIN,
    INPUTS,
    NAME,
    OPSET,
    VERSION,
    function,
    initializers,
)
from graphprune.packing.onnx_timing import faster
from graphprune.packing.report import Layer, Packing
from graphprune.progress import Part
from graphprune.runtime.formats import AUTO, check_format


@dataclass(frozen=True, eq=False)
class _Product:
    """A node that multiplies by a constant matrix.

    Attributes:
        node: MatMul or Gemm.
        weight: its initializer.
        across: whether the initializer is [inputs, outputs].
    """

    node: ir.Node
    weight: ir.Value
    across: bool

    def matrix(self) -> torch.Tensor:
        """[outputs, inputs]."""
        assert self.weight.const_value is not None
        array = np.array(self.weight.const_value.numpy())
        return torch.from_numpy(np.ascontiguousarray(array.T if self.across else array))


def pack_onnx(
    source: Path, output: Path, claim: Claim, format: str, tokens: tuple[int, ...], progress: Any
) -> Packing:
    """See `graphprune.packing.pack`; the output is written by its claim."""
    check_format(format, (Bitmap.format, AUTO))
    if output.suffix != ".onnx":
        raise EmitError(
            "an ONNX file is packed as an ONNX file",
            where=str(output),
            hint="give an output that ends in .onnx",
        )
    progress("reading the file")
    model = read_onnx(source)
    if claim.path in data_of(model):
        raise EmitError(
            "the output would replace the weights of the source",
            where=str(output),
            hint="choose another output",
        )
    imports = model.graph.opset_imports
    opset = imports.get("", imports.get("ai.onnx", 0))
    if opset < OPSET:
        raise EmitError(
            f"a model of opset {opset} can't be packed",
            where=str(source),
            why=f"decoding a weight takes operators of opset {OPSET}",
            hint=f"convert it: onnx.version_converter.convert_version(model, {OPSET})",
        )
    before = weight_bytes(model)
    products = list(_products(model.graph))
    table = Table.usual() if format == AUTO else None
    layers = []
    for count, product in enumerate(products):
        progress(Part("packing", count + 1, len(products), rest=f", {product.weight.name}"))
        layers.append(_packed(model, product, tokens, table))
    if all(e.format == DENSE for e in layers):
        raise EmitError(
            "no weight becomes smaller",
            where=str(source),
            why="; ".join(sorted({f"{e.why}: {e.name}" for e in layers})[:3])
            or "no MatMul or Gemm of the main graph has a constant float32 matrix of its own",
            hint="pack what `graphprune compile --sparsify` wrote",
        )
    body = ir.serde.deserialize_function(function(opset))
    model.functions[body.identifier()] = body
    model.ir_version = max(model.ir_version, 8)  # the first with functions
    model.graph.opset_imports[DOMAIN] = VERSION
    after = weight_bytes(model)
    progress("writing")
    check_space(output, after)
    with claim.writing() as file:
        write_checked(model, file, external=after > EXTERNAL_ABOVE)
        progress("putting the file in place")
    return Packing(str(source), str(output), tuple(layers), before, after)


def _free(graph: ir.Graph, name: str) -> str:
    """A name whose parts no value has yet."""
    used = {v.name for node in graph.all_nodes() for v in (*node.inputs, *node.outputs) if v}
    used |= {v.name for v in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    while any(f"{name}.{part}" in used for part in (*INPUTS, "product")):
        name += "_"
    return name


def _products(graph: ir.Graph) -> Iterator[_Product]:
    """Products whose matrix nothing else uses."""
    for node in graph:
        if node.domain != "" or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        alone = len(weight.uses()) == 1 and not weight.is_graph_output()
        tensor = weight.const_value if weight.is_initializer() else None
        if tensor is None or not alone or weight.is_graph_input():
            continue
        if tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2 or 0 in tensor.shape:
            continue
        if node.op_type == "MatMul":
            yield _Product(node, weight, True)
        elif node.op_type == "Gemm":
            factors = [node.attributes.get_float(n, 1.0) for n in ("alpha", "beta")]
            if factors == [1.0, 1.0] and not node.attributes.get_int("transA", 0):
                yield _Product(node, weight, not node.attributes.get_int("transB", 0))


def _packed(
    model: ir.Model, product: _Product, tokens: tuple[int, ...], table: Table | None
) -> Layer:
    name = str(product.weight.name)
    matrix = product.matrix()
    size = matrix.numel() * matrix.element_size()
    sparsity = 1 - int(matrix.count_nonzero()) / matrix.numel()
    rows, columns = matrix.shape
    packed = Bitmap.pack(matrix)
    why = ""
    if sparsity == 0:
        why = "no zeros"
    elif table is None and nbytes(packed) >= size:
        why = "not smaller"
    elif table is not None and not faster(matrix, tokens, table):
        why = "a dense product is faster here"
    if why:
        return Layer(name, (rows, columns), sparsity, DENSE, size, size, why)
    _replace(model.graph, product, packed)
    return Layer(name, (rows, columns), sparsity, Bitmap.format, size, nbytes(packed))


def _replace(graph: ir.Graph, product: _Product, packed: Bitmap) -> None:
    node, weight = product.node, product.weight
    name = _free(graph, str(weight.name))
    placed = ir.tape.Tape(graph)
    parts = [
        placed.initializer(ir.serde.deserialize_tensor(part)) for part in initializers(name, packed)
    ]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    new = ir.tape.Tape()
    result = new.op(NAME, [node.inputs[0], *parts], domain=DOMAIN, name=node.name)
    if bias is not None:
        result.name = f"{name}.product"
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        result = new.op("Add", [result, bias], name=f"{node.name}_bias")
    ir.convenience.replace_nodes_and_values(graph, node, [node], new.nodes, node.outputs, [result])
    assert weight.name is not None
    del graph.initializers[weight.name]
