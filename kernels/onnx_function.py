"""The ONNX operator `graphprune::BitmapLinear`, and what it means in standard operators.

y = x W^T for a weight in the format `bitmap`. A model holds nodes of that operator together with a
function of the same name. ONNX Runtime uses the kernel in C++ if that library is registered (see
`native.path`); otherwise it puts the function in the node's place, and decodes the weight once,
when the model is loaded. A bias is a standard Add behind the node.
"""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from torch import Tensor

from .formats.bitmap import Bitmap

DOMAIN, NAME, VERSION = "graphprune", "BitmapLinear", 1
OPSET = 13  # of the standard operators in the function: the first where axes are inputs
INPUTS = ("x", "compressed", "bitmask", "row_offsets", "shape")


def opset_imports(opset: int = 18) -> list[onnx.OperatorSetIdProto]:
    """What a model with such nodes imports.

    Args:
        opset: of the standard operators in the model, `OPSET` or later.
    """
    return [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]


def function(opset: int = 18) -> onnx.FunctionProto:
    """The function, for `ModelProto.functions`.

    Args:
        opset: of the standard operators; best the model's own, so that none has to be converted.
    """
    # CastLike is younger than the rest; without it values are float32.
    zero = "CastLike (nothing_float, compressed)" if opset >= 15 else "Identity (nothing_float)"
    text = f"""
        <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
        {NAME} ({", ".join(INPUTS)}) => (y)
        {{
            columns = Constant <value_ints = [1]> ()
            last = Constant <value_ints = [2]> ()
            zero = Constant <value_ints = [0]> ()
            rest = Constant <value_ints = [0, -1]> ()
            flat = Constant <value_ints = [-1]> ()
            axis = Constant <value_int = 0> ()
            places = Constant <value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
            two = Constant <value = uint8 {{2}}> ()
            bytes = Unsqueeze (bitmask, last)
            shifted = BitShift <direction = "RIGHT"> (bytes, places)
            parts = Mod (shifted, two)
            padded = Reshape (parts, rest)
            width = Slice (shape, columns, last)
            kept = Slice (padded, zero, width, columns)
            kept_flat = Reshape (kept, flat)
            bits = Cast <to = {TensorProto.INT64}> (kept_flat)
            count = CumSum (bits, axis)
            index = Mul (count, bits)
            nothing_float = Constant <value_floats = [0.0]> ()
            nothing = {zero}
            values = Concat <axis = 0> (nothing, compressed)
            weight_flat = Gather (values, index)
            weight = Reshape (weight_flat, shape)
            transposed = Transpose <perm = [1, 0]> (weight)
            y = MatMul (x, transposed)
        }}"""
    parsed = parser.parse_function(text)
    parsed.doc_string = "y = x W^T. Unset bits take the zero that is put before the values."
    return parsed


def initializers(name: str, packed: Bitmap) -> list[onnx.TensorProto]:
    """The parts of a weight, in the order of the node's inputs.

    Args:
        name: of the weight; theirs are ``name.compressed`` and so on.
        packed: on any device.
    """
    parts = {**packed.tensors(), "shape": torch.tensor(packed.shape, dtype=torch.int64)}
    return [_tensor(f"{name}.{part}", parts[part]) for part in INPUTS[1:]]


def _tensor(name: str, part: Tensor) -> onnx.TensorProto:
    part = part.detach().cpu().contiguous()
    if part.dtype != torch.bfloat16:
        return numpy_helper.from_array(part.numpy(), name)
    raw = part.view(torch.int16).numpy().tobytes()
    return helper.make_tensor(name, TensorProto.BFLOAT16, list(part.shape), raw, raw=True)


def node(x: str, weight: str, y: str, name: str = "") -> onnx.NodeProto:
    """A node.

    Args:
        x: name of the tokens.
        weight: name that `initializers` was given.
        y: name of the output.
        name: of the node.
    """
    inputs = [x, *(f"{weight}.{part}" for part in INPUTS[1:])]
    return helper.make_node(NAME, inputs, [y], name=name, domain=DOMAIN)
