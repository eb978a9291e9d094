"""Which products of an ONNX graph are its outputs, and which tell experts apart."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.ir.onnx.infer import captured
from graphprune.ir.onnx.program import OnnxProgram


def is_output(program: OnnxProgram, product: ir.Value) -> bool:
    """Whether a result reaches the model's outputs without meeting another tensor.

    A bias is a part of the product, and numbers and sizes are no tensors. So are not the two
    branches of an activation that an exporter has taken apart.
    """
    return any(v.is_graph_output() for v in _alone(program, product, biases=False))


def is_chosen_from(program: OnnxProgram, product: ir.Value) -> bool:
    """Whether the largest of a result are looked for, whatever biases are added before."""
    return any(
        node.op_type == "TopK" and place == 0
        for value in _alone(program, product, biases=True)
        for node, place in value.uses()
    )


def _alone(program: OnnxProgram, product: ir.Value, *, biases: bool) -> list[ir.Value]:
    """The values that are computed from a product and no other tensor.

    Args:
        program: gives the graph.
        product: the result of a product.
        biases: whether what shifts and scales it may be met everywhere; otherwise only a bias that
            is added to the product itself.
    """
    reached = {product: True}  # to whether it is the bare product, whose bias may come
    waiting = [product]
    while waiting:
        value = waiting.pop()
        for node, _ in value.uses():
            if node.graph is not program.model.graph or captured(node):
                continue
            bare = any(reached.get(v, False) for v in node.inputs if v is not None)
            adds = (node.op_type == "Add" and bare) or (biases and node.op_type in _SHIFTS)
            others = [v for v in node.inputs if v is not None and v not in reached]
            if node.outputs[0] in reached or not all(
                _is_number(program, v) or (adds and v.is_initializer()) for v in others
            ):
                continue
            waiting.extend(node.outputs)
            reached |= {v: bare and node.op_type in _SAME for v in node.outputs}
    return list(reached)


_SAME = frozenset(("Identity", "Cast", "Reshape"))
"""Operators that may stand between a product and its bias."""
_SHIFTS = frozenset(("Add", "Sub", "Mul", "Div"))


def _is_number(program: OnnxProgram, value: ir.Value) -> bool:
    """Whether a value is a single number of the model, or made of sizes."""
    known = program.known.get(value.name or "")
    if known is None:
        return False
    if value.is_initializer():
        return not known.dtype.is_floating_point() or max((1, *known.shapes[0])) == 1
    return known.values is not None and not known.dtype.is_floating_point()
