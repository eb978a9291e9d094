"""The ONNX table, continued: quantised numbers, by themselves and as operands of products.

A scale or zero point is one number, or one for every index of an axis, which is then its axis too.
A slim model that drops indices reads the others as before, so that any axis may be pruned; only
what one scale is shared by in blocks goes as a whole block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphprune.axes import Dims, Expr, product
from graphprune.ops.context import Context, Operator, Rule, RuleError
from graphprune.ops.families import contraction, pointwise, shape
from graphprune.ops.families.pointwise import wrap
from graphprune.ops.onnx.shapes import RUNTIME as RUNTIME_SHAPES
from graphprune.ops.onnx.shapes import TYPES
from graphprune.ops.onnx.standard import convolved, dims, maybe
from graphprune.ops.registry import ONNX, Shape

RUNTIME = "com.microsoft."
PACKED = RUNTIME + "MatMulNBits"


def _along(ctx: Context, given: Dims | None, e: Expr | None) -> None:
    """A scale or zero point: a single number, or one for every index of `e`."""
    several = [d for d in given or () if d.size != 1]
    if not several:
        return
    if e is None or len(several) != 1 or several[0].size != e.size:
        raise RuleError(f"scales or zero points of sizes {[d.size for d in several]}")
    ctx.unify(several[0], e)


def _quantise(ctx: Context, op: Operator) -> Dims:
    """Scales and zero points for the whole tensor, per index of an axis, or per block of it."""
    x, block = dims(op, 0), int(op.get("block_size", 0))
    axis = wrap(op.get("axis", 1), len(x))
    along = x[axis] if axis < len(x) else None
    for i in (1, 2):
        given = maybe(op, i)
        if given is None:
            continue
        if not block:
            _along(ctx, given, along)
            continue
        for j, (a, b) in enumerate(zip(x, given, strict=True)):
            if j != axis:
                ctx.unify(a, b)
            elif a.size == b.size * block:
                ctx.unify(a, product((b, ctx.fresh(block, "quantised as one block"))))
            else:
                ctx.freeze(a, "quantised in blocks, of which the last is shorter")
                ctx.freeze(b, "the scales of blocks, of which the last is shorter")
    return x


def _dynamic(ctx: Context, op: Operator) -> list[Dims]:
    """Quantised by its own range, which holds zero, so that what is pruned doesn't narrow it."""
    del ctx
    return [dims(op, 0), (), ()][: len(op.results)]


def _product(ctx: Context, op: Operator, places: Sequence[int]) -> Dims:
    """A matrix product; `places` are those of both operands and of their scales and zero points.

    Scales of the first operand are for rows, those of the second for columns.
    """
    first, second, rows, columns = places[0], places[1], places[2::2], places[3::2]
    a, b = dims(op, first), dims(op, second)
    if len(a) < 2 or len(b) < 2:
        raise RuleError("a quantised product with a vector")
    for i in rows:
        _along(ctx, maybe(op, i), a[-2])
    for i in columns:
        _along(ctx, maybe(op, i), b[-1])
    return contraction.matmul(ctx, a, b)


def _matmul_integer(ctx: Context, op: Operator) -> Dims:
    """``A, B, zero points of A, of B``."""
    return _product(ctx, op, (0, 1, 2, 3))


def _qlinear_matmul(ctx: Context, op: Operator) -> Dims:
    """``A, scale, zero point, B, scale, zero point, scale and zero point of the result``."""
    _single(op, 6, 7)
    return _product(ctx, op, (0, 3, 1, 4, 2, 5))


def _single(op: Operator, *places: int) -> None:
    """Refuse several scales or zero points of one operand."""
    for i in places:
        if math.prod(e.size for e in maybe(op, i) or ()) != 1:
            raise RuleError("several scales or zero points of what has one")


def _qlinear_conv(ctx: Context, op: Operator) -> Dims:
    """As `_qlinear_matmul`, then a bias in steps of the product of both scales."""
    _single(op, 1, 2, 6, 7)
    weight = dims(op, 3)
    for i in (4, 5):
        _along(ctx, maybe(op, i), weight[0])
    return convolved(ctx, op, dims(op, 0), weight, maybe(op, 8))


def _conv_integer(ctx: Context, op: Operator) -> Dims:
    """``x, weight, zero points of x, of the weight``."""
    _single(op, 2)
    weight = dims(op, 1)
    _along(ctx, maybe(op, 3), weight[0])
    return convolved(ctx, op, dims(op, 0), weight, None)


def _qlinear_binary(ctx: Context, op: Operator) -> Dims:
    """``A, scale, zero point, B, scale, zero point, scale and zero point of the result``."""
    _single(op, 1, 2, 4, 5, 6, 7)
    return pointwise.broadcast(ctx, [dims(op, 0), dims(op, 3)], op.out)


def _qlinear_unary(ctx: Context, op: Operator) -> Dims:
    """``x, scale, zero point, scale and zero point of the result``."""
    del ctx
    _single(op, 1, 2, 3, 4)
    return dims(op, 0)


def _qlinear_softmax(ctx: Context, op: Operator) -> Dims:
    """The axis that is normalised is frozen: its integers come from a table."""
    x = _qlinear_unary(ctx, op)
    axis = wrap(op.get("axis", -1), len(x))
    for e in x[axis:] if int(op.get("opset", 13)) < 13 else x[axis : axis + 1]:
        ctx.freeze(e, "a softmax of quantised numbers")
    return x


def _qlinear_concat(ctx: Context, op: Operator) -> Dims:
    """Scale and zero point of the result, then each part with its own."""
    parts = range(2, sum(name.isdigit() for name in op.arguments), 3)
    return shape.concatenate(ctx, [dims(op, i) for i in parts], op["axis"])


def _qlinear_average(ctx: Context, op: Operator) -> Dims:
    """The mean of each channel, channels second."""
    if op.get("channels_last", 0):
        raise RuleError("channels last")
    _single(op, 1, 2, 3, 4)
    x = dims(op, 0)
    for e in x[2:]:
        ctx.freeze(e, "spatial")
    return (*x[:2], *(ctx.fresh(s, "spatial") for s in op.out[2:]))


def _qgemm(ctx: Context, op: Operator) -> Dims:
    """As `_qlinear_matmul` on matrices that may be transposed, with a bias before the result."""
    _single(op, 1, 2, 7, 8)
    a, b, bias = dims(op, 0), dims(op, 3), maybe(op, 6)
    a = a[::-1] if op.get("transA", 0) else a
    b = b[::-1] if op.get("transB", 0) else b
    for i in (4, 5):
        _along(ctx, maybe(op, i), b[-1])
    result = contraction.matmul(ctx, a, b)
    return result if bias is None else pointwise.broadcast(ctx, [result, bias], op.out)


def _dynamic_matmul(ctx: Context, op: Operator) -> Dims:
    """``A, B, scales of B, zero points of B, bias``; A is quantised by its own range."""
    b = dims(op, 1)
    for i in (2, 3, 4):
        _along(ctx, maybe(op, i), b[-1])
    return contraction.matmul(ctx, dims(op, 0), b)


def _matmul_to_float(ctx: Context, op: Operator) -> Dims:
    """``A, B, scales of A, of B, zero points of A, of B, bias``."""
    _along(ctx, maybe(op, 6), dims(op, 1)[-1])
    return _product(ctx, op, (0, 1, 2, 3, 4, 5))


def _packed(ctx: Context, op: Operator) -> Dims:
    """``A [.., in]``, bytes of B ``[out, blocks, bytes of a block]``, scales, zero points.

    Zero points of 4 bits share a byte between two blocks, which then go together.
    """
    x, (out, blocks, shared) = dims(op, 0), dims(op, 1)
    bits, size = int(op.get("bits", 4)), int(op["block_size"])
    if op.get("weight_prepacked", 0) or bits not in (2, 4, 8):
        raise RuleError("weights in a layout of some device")
    ctx.freeze(shared, "the bytes of one quantised block")
    order, bias = maybe(op, 4), maybe(op, 5)
    if order is not None:
        for e in (*order, blocks):
            ctx.freeze(e, "its columns are taken in another order")
    _split_blocks(ctx, op, blocks, 8 // bits)
    if x[-1].size == blocks.size * size:
        ctx.unify(x[-1], product((blocks, ctx.fresh(size, "quantised as one block"))))
    else:
        for e in (x[-1], blocks):
            ctx.freeze(e, "quantised in blocks, of which the last is shorter")
    for given in (dims(op, 2), maybe(op, 3) if _as_scales(op) else None):
        if given is not None:
            _per_block(ctx, given, out, blocks)
    _along(ctx, bias, out)
    ctx.macs((*x[:-1], out, x[-1]))
    return (*x[:-1], out)


def _as_scales(op: Operator) -> bool:
    """Whether zero points have an element for each block, which is of the type of the scales."""
    zero, scale = maybe(op, 3), dims(op, 2)
    sizes = [math.prod(e.size for e in d) for d in (zero or (), scale)]
    return zero is not None and sizes[0] == sizes[1]


def _per_block(ctx: Context, given: Dims, out: Expr, blocks: Expr) -> None:
    """One element for every row and block, in one dimension or two."""
    ctx.unify(product(given), product((out, blocks)))


def _split_blocks(ctx: Context, op: Operator, blocks: Expr, together: int) -> None:
    """Zero points of several blocks in a byte: ``[out, blocks / together]``, rounded up."""
    zero, out = maybe(op, 3), dims(op, 1)[0]
    if zero is None or _as_scales(op):
        return
    if blocks.size % together:
        ctx.freeze(blocks, "the zero points of several blocks share a byte")
        shared = ctx.fresh(-(-blocks.size // together), "zero points that share a byte")
    else:
        shared = ctx.fresh(blocks.size // together)
        both = ctx.fresh(together, "the zero points of several blocks share a byte")
        ctx.unify(blocks, product((shared, both)))
    ctx.unify(product(zero), product((out, shared)))


_RULES: dict[str, Rule] = {
    "onnx.QuantizeLinear": _quantise,
    "onnx.DequantizeLinear": _quantise,
    "onnx.DynamicQuantizeLinear": _dynamic,
    "onnx.MatMulInteger": _matmul_integer,
    "onnx.QLinearMatMul": _qlinear_matmul,
    "onnx.ConvInteger": _conv_integer,
    "onnx.QLinearConv": _qlinear_conv,
    RUNTIME + "QuantizeLinear": _quantise,
    RUNTIME + "DequantizeLinear": _quantise,
    RUNTIME + "QLinearAdd": _qlinear_binary,
    RUNTIME + "QLinearMul": _qlinear_binary,
    RUNTIME + "QLinearSigmoid": _qlinear_unary,
    RUNTIME + "QLinearLeakyRelu": _qlinear_unary,
    RUNTIME + "QLinearGlobalAveragePool": _qlinear_average,
    RUNTIME + "QLinearSoftmax": _qlinear_softmax,
    RUNTIME + "QLinearConcat": _qlinear_concat,
    RUNTIME + "QGemm": _qgemm,
    RUNTIME + "DynamicQuantizeMatMul": _dynamic_matmul,
    RUNTIME + "MatMulIntegerToFloat": _matmul_to_float,
    PACKED: _packed,
}
for _name, _rule in _RULES.items():
    ONNX.add(_name, _rule)


# The shapes of the results of ONNX Runtime's own operators.
def _like_first(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    del attributes
    return [shapes[0]]


def _broadcast(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    del attributes
    return [tuple(np.broadcast_shapes(shapes[0], shapes[3]))]


def _joined(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    parts, axis = shapes[2::3], int(attributes["axis"])
    whole = list(parts[0])
    whole[axis] = sum(part[axis] for part in parts)
    return [tuple(whole)]


def _averaged(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    x = shapes[0]
    if attributes.get("channels_last"):
        return [(x[0], *(1 for _ in x[2:]), x[-1])]
    return [(*x[:2], *(1 for _ in x[2:]))]


def _gemm(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    rows = shapes[0][1 if attributes.get("transA") else 0]
    return [(rows, shapes[3][0 if attributes.get("transB") else 1])]


def _multiplied(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    del attributes
    a, b = shapes[0], shapes[1]
    return [(*np.broadcast_shapes(a[:-2], b[:-2]), *a[-2:-1], *b[-1:])]


def _unpacked(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    return [(*shapes[0][:-1], int(attributes["N"]))]


for _name, _shapes in {
    "QuantizeLinear": _like_first,
    "DequantizeLinear": _like_first,
    "QLinearAdd": _broadcast,
    "QLinearMul": _broadcast,
    "QLinearSigmoid": _like_first,
    "QLinearLeakyRelu": _like_first,
    "QLinearGlobalAveragePool": _averaged,
    "QLinearSoftmax": _like_first,
    "QLinearConcat": _joined,
    "QGemm": _gemm,
    "DynamicQuantizeMatMul": _multiplied,
    "MatMulIntegerToFloat": _multiplied,
    "MatMulNBits": _unpacked,
}.items():
    RUNTIME_SHAPES.add(_name, _shapes)
TYPES |= {"QLinearConcat": (1,), "QuantizeLinear": (2,), "DequantizeLinear": (1,), "QGemm": (8,)}
TYPES |= {"MatMulIntegerToFloat": (2,)}
