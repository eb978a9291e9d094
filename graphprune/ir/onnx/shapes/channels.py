"""Channels of inputs that a file leaves open, though its convolutions take only one number."""

from __future__ import annotations

import onnx_ir as ir

# Operators whose result has the channels of their first operand.
_SAME = frozenset(
    "Add AveragePool Cast Clip Div DequantizeLinear Identity MaxPool Mul Pad QuantizeLinear Resize "
    "Sub".split()
)


def channels_read(value: ir.Value) -> int | None:
    """The size of dimension 1 that the first convolutions after an input take; None without any.

    Args:
        value: the input.
    """
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop(0)
        for node, place in current.uses():
            if node.op_type == "Conv" and place == 0:
                kernel = node.inputs[1].const_value if node.inputs[1] is not None else None
                if kernel is not None:
                    return int(kernel.shape.numpy()[1]) * node.attributes.get_int("group", 1)
            elif node.op_type in _SAME and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return None
