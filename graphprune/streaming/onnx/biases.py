"""What is added to the product of each initialiser; see `graphprune.streaming.find_biases`."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.onnx.shapes.sizes import qualified
from graphprune.streaming.core.layout import Convolution, Matrix
from graphprune.streaming.core.sites import Site
from graphprune.streaming.onnx.products import ATTENTION, CONVOLUTIONS, GEMMS, MATMULS


def onnx_biases(program: OnnxProgram, sites: Iterable[Site]) -> dict[str, str]:
    """The biases of products and convolutions; see `graphprune.streaming.find_biases`."""
    nodes = {v.name: node for node in program.model.graph for v in node.outputs}
    found: dict[str, ir.Value | None] = {}
    adding: dict[str, set[ir.Node]] = {}
    for site in sites:
        node, bias = _bias(nodes[site.node], site)
        if found.setdefault(site.parameter, bias) is not bias:
            found[site.parameter] = None
        adding.setdefault(site.parameter, set()).add(node)
    return {
        weight: bias.name or ""
        for weight, bias in found.items()
        if bias is not None
        and bias.name in program.trainable
        and bias.name not in program.encodings
        and {node for node, _ in bias.uses()} <= adding[weight]
    }


def _bias(node: ir.Node, site: Site) -> tuple[ir.Node, ir.Value | None]:
    """The operator that adds a bias to a product, and the bias; None if there is none."""
    name = qualified(node)
    if not isinstance(site.layout, Matrix | Convolution):
        return node, None
    if name in CONVOLUTIONS | GEMMS | {ATTENTION}:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        rows = isinstance(site.layout, Matrix) and site.layout.features != -1
        scaled = rows or node.attributes.get_float("beta", 1.0) != 1
        return node, None if scaled or bias is None or not _is_vector(bias) else bias
    uses = list(node.outputs[0].uses())
    if name not in MATMULS or len(uses) != 1 or uses[0].node.op_type != "Add":
        return node, None
    adds, place = uses[0]
    bias = adds.inputs[1 - place]
    last = getattr(site.layout, "features", 0) == -1
    return adds, bias if bias is not None and last and _is_vector(bias) else None


def _is_vector(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and len(tensor.shape) == 1
