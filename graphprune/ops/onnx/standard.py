"""The ONNX table: which family each standard operator belongs to, and where its arguments are.

Inputs are named by their position, "0", "1", ...; attributes by their own names. Where an opset
moved an attribute to an input, both are looked for.
"""

from __future__ import annotations

from graphprune.axes import UNIT, Atom, Dims, Expr, product
from graphprune.ops.context import Context, Operand, Operator, RuleError, Size
from graphprune.ops.families import contraction, indexing, normalisation, pointwise, shape
from graphprune.ops.families.pointwise import axes_of, operand, reduce_axes, wrap
from graphprune.ops.registry import ONNX

rule = ONNX.rule

ACTIVATIONS = frozenset(
    f"onnx.{_name}"
    for _name in (
        "Relu Gelu Sigmoid Tanh Softplus Elu Selu Celu LeakyRelu PRelu HardSwish HardSigmoid Mish "
        "Swish ThresholdedRelu Softsign Erf Exp Sin Cos Abs Clip"
    ).split()
)

for _name in (
    "Identity Cast CastLike Relu Gelu Sigmoid Tanh Softplus Elu Selu Celu LeakyRelu HardSwish "
    "HardSigmoid Mish Swish ThresholdedRelu Softsign Erf Exp Log Sqrt Reciprocal Neg Abs Sign Ceil "
    "Floor Round Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Not IsNaN IsInf BitwiseNot "
    "Shrink Clip CumSum LpNormalization"
).split():
    ONNX.add(f"onnx.{_name}", pointwise.same)

for _name in "Softmax LogSoftmax".split():
    ONNX.add(f"onnx.{_name}", pointwise.distribution)

for _name in (
    "Add Sub Mul Div Pow Mod And Or Xor Where Max Min Mean Sum PRelu BitShift BitwiseAnd BitwiseOr "
    "BitwiseXor"
).split():
    ONNX.add(f"onnx.{_name}", pointwise.elementwise)

for _name in "Equal Less LessOrEqual Greater GreaterOrEqual".split():
    ONNX.add(f"onnx.{_name}", indexing.compared)

ONNX.add("onnx.ConstantOfShape", pointwise.uniform)

# What they give is folded where it is the same on all inputs, and has operands where it isn't.
for _name in "EyeLike Range Shape Size".split():
    ONNX.add(f"onnx.{_name}", indexing.constant)

# The values of their results are values of their first operand, in whatever places.
CARRIERS = frozenset(
    f"onnx.{_name}"
    for _name in (
        "Identity Cast Reshape Flatten Squeeze Unsqueeze Transpose Expand Tile Slice Split"
    ).split()
)


def dims(op: Operator, position: int) -> Dims:
    """The axes of an input.

    Raises:
        RuleError: there is no such input.
    """
    value = operand(op, str(position))
    if value is None:
        raise RuleError(f"{op.name} without input {position}")
    return value.dims


def maybe(op: Operator, position: int) -> Dims | None:
    """The axes of an optional input."""
    value = operand(op, str(position))
    return None if value is None else value.dims


def integers(op: Operator, name: str, position: int) -> list[int] | None:
    """Constant integers that are an attribute in some opsets and an input in others.

    Raises:
        RuleError: they are computed.
    """
    value = operand(op, str(position))
    if value is None:
        given = op.get(name)
        return given if given is None else [int(i) for i in given]
    if value.value is None:
        raise RuleError(f"{op.name} with computed {name}")
    return [int(i) for i in value.value.reshape(-1)]


@rule(*(f"Reduce{_n}" for _n in "Mean Sum SumSquare Max Min Prod L1 L2 LogSum LogSumExp".split()))
def _reduce(ctx: Context, op: Operator) -> Dims:
    del ctx
    x = dims(op, 0)
    axes = integers(op, "axes", 1)
    if not axes and op.get("noop_with_empty_axes", 0):
        return x
    return reduce_axes(x, axes_of(axes, len(x)), bool(op.get("keepdims", 1)))


@rule("ArgMax", "ArgMin")
def _extreme(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    axis = wrap(op.get("axis", 0), len(x))
    ctx.choose(x[axis], 0)
    return reduce_axes(x, [axis], bool(op.get("keepdims", 1)))


@rule("TopK")
def _top_k(ctx: Context, op: Operator) -> list[Dims]:
    changed = {"0": op["0"], "dim": op.get("axis", -1)}
    return indexing.top_k(ctx, Operator(op.name, changed, op.results))


@rule("Hardmax")
def _hardmax(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    ctx.freeze(x[wrap(op.get("axis", -1), len(x))], "the first of equal places is taken")
    return x


@rule("Dropout")
def _dropout(ctx: Context, op: Operator) -> list[Dims]:
    """Its input, unless it is told to be random."""
    x = dims(op, 0)
    training = operand(op, "2")
    if training is not None and (training.value is None or training.value.any()):
        for e in x:
            ctx.freeze(e, pointwise.RANDOM)
    return [x for _ in op.results]


@rule(
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
def _random(ctx: Context, op: Operator) -> Dims:
    """Random numbers for every element: a slim model would draw others."""
    for value in op.operands:
        for e in value.dims:
            ctx.freeze(e, pointwise.RANDOM)
    return pointwise.drawn(ctx, op)


@rule("Trilu")
def _triangle(ctx: Context, op: Operator) -> Dims:
    offset = integers(op, "k", 1) or [0]
    name = "onnx.triu" if op.get("upper", 1) else "onnx.tril"
    return pointwise.matrix_shaped(
        ctx, Operator(name, {"0": op["0"], "diagonal": offset[0]}, op.results)
    )


@rule("MatMul")
def _matmul(ctx: Context, op: Operator) -> Dims:
    return contraction.matmul(ctx, dims(op, 0), dims(op, 1))


@rule("Gemm")
def _gemm(ctx: Context, op: Operator) -> Dims:
    a, b, bias = dims(op, 0), dims(op, 1), maybe(op, 2)
    a = a[::-1] if op.get("transA", 0) else a
    b = b[::-1] if op.get("transB", 0) else b
    result = contraction.matmul(ctx, a, b)
    return result if bias is None else pointwise.broadcast(ctx, [result, bias], op.out)


@rule("Einsum")
def _einsum(ctx: Context, op: Operator) -> Dims:
    return contraction.einsum(ctx, op["equation"], [o.dims for o in op.operands])


@rule("Conv", "ConvTranspose")
def _convolution(ctx: Context, op: Operator) -> Dims:
    return convolved(ctx, op, dims(op, 0), dims(op, 1), maybe(op, 2))


def convolved(ctx: Context, op: Operator, x: Dims, weight: Dims, bias: Dims | None) -> Dims:
    """A convolution with the attributes of Conv, wherever its inputs are."""
    rank = len(weight) - 2
    strides = op.get("strides") or [1] * rank
    pads = op.get("pads") or [0] * (2 * rank)
    extra = op.get("output_padding") or [0] * rank
    still = [
        (weight[i + 2].size, strides[i], pads[i], pads[i + rank], extra[i]) == (1, 1, 0, 0, 0)
        for i in range(rank)
    ]
    return contraction.convolution(
        ctx,
        x,
        weight,
        bias,
        groups=Size(op.get("group", 1)),
        transposed=op.name.endswith("Transpose"),
        still=still,
        out=op.out,
    )


@rule("BatchNormalization", "InstanceNormalization")
def _channel_norm(ctx: Context, op: Operator) -> list[Dims]:
    x = normalisation.per_channel(ctx, dims(op, 0), [maybe(op, i) for i in range(1, 5)])
    return [x, *(tuple(ctx.fresh(s, "unused") for s in r or ()) for r in op.results[1:])]


@rule("MeanVarianceNormalization")
def _over_named_axes(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    for axis in op.get("axes") or (0, 2, 3):
        ctx.freeze(x[wrap(axis, len(x))], "normalised over it")
    return x


@rule("GroupNormalization")
def _group_norm(ctx: Context, op: Operator) -> Dims:
    x, scale, bias = dims(op, 0), dims(op, 1), dims(op, 2)
    groups = int(op["num_groups"])
    if scale[0].size != x[1].size:  # before opset 21: one of each per group
        normalisation.over_space(ctx, x)
        inner = Atom(x[1].size // groups, ctx.node)
        ctx.unify(x[1], product((scale[0], inner)))
        ctx.unify(scale[0], bias[0])
        return x
    return normalisation.grouped(ctx, x, groups, [scale, bias])


@rule("LayerNormalization", "RMSNormalization")
def _trailing_norm(ctx: Context, op: Operator) -> list[Dims]:
    x = dims(op, 0)
    axis = wrap(op.get("axis", -1), len(x))
    parameters = [maybe(op, 1), maybe(op, 2)]
    whole = [p if p is None or len(p) == len(x) - axis else None for p in parameters]
    if whole != parameters:
        raise RuleError("scales of another rank than the normalised dimensions")
    normalisation.trailing(ctx, x, whole)
    statistics = (*x[:axis], *(UNIT for _ in x[axis:]))
    return [x, *(statistics for _ in op.results[1:])]


@rule("LRN")
def _local_norm(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    ctx.freeze(x[1], "normalised by neighbouring channels")
    return x


@rule("Reshape", "Flatten")
def _reshape(ctx: Context, op: Operator) -> Dims:
    return shape.reshape(ctx, dims(op, 0), op.out)


@rule("Squeeze", "Unsqueeze")
def _units(ctx: Context, op: Operator) -> Dims:
    """Dimensions of size 1 taken away or put in: the others keep their order."""
    x = dims(op, 0)
    axes = integers(op, "axes", 1)
    if op.name.endswith("Unsqueeze"):
        new = axes_of(axes, len(op.out))
        rest = iter(x)
        return tuple(UNIT if i in new else next(rest) for i in range(len(op.out)))
    gone = [i for i, e in enumerate(x) if e.size == 1] if not axes else axes_of(axes, len(x))
    del ctx
    return tuple(e for i, e in enumerate(x) if i not in gone)


@rule("Transpose")
def _transpose(ctx: Context, op: Operator) -> Dims:
    del ctx
    x = dims(op, 0)
    return shape.permute(x, op.get("perm") or range(len(x))[::-1])


@rule("Expand")
def _expand(ctx: Context, op: Operator) -> Dims:
    return shape.expand(ctx, dims(op, 0), op.out)


@rule("Concat")
def _concat(ctx: Context, op: Operator) -> Dims:
    return shape.concatenate(ctx, [o.dims for o in op.operands], op["axis"])


@rule("Split")
def _split(ctx: Context, op: Operator) -> list[Dims]:
    x = dims(op, 0)
    axis = wrap(op.get("axis", 0), len(x))
    sizes = [r[axis] for r in op.results if r is not None]
    if len(sizes) != len(op.results):
        raise RuleError("pieces of unknown size")
    return [shape.replace(x, axis, e) for e in shape.cut(ctx, x[axis], sizes)]


@rule("Slice")
def _slice(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    out = op.out
    try:
        starts, ends = integers(op, "starts", 1) or [], integers(op, "ends", 2) or []
        axes = integers(op, "axes", 3) or list(range(len(starts)))
        steps = integers(op, "steps", 4) or [1] * len(starts)
    except RuleError:  # bounds are computed: what is cut has a dynamic size
        return tuple(_cut_somewhere(ctx, x, i, s) for i, s in enumerate(out))
    result = x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        i = wrap(axis, len(x))
        n = x[i].size
        if step == -1 and out[i].size == n:
            result = shape.replace(result, i, shape.flip((result[i],), [0])[0])
        elif step < 0:
            ctx.freeze(x[i], "single places are taken")
            result = shape.replace(result, i, ctx.fresh_like(out[i], x[i]))
        else:
            first, last = (min(max(wrap(p, n), 0), n) for p in (start, end))
            result = shape.slice_(ctx, result, i, first, max(last, first), step, out[i])
    return result


def _cut_somewhere(ctx: Context, x: Dims, i: int, size: Size) -> Expr:
    if x[i].size == size.size and not size.dynamic:
        return x[i]
    ctx.freeze(x[i], "cut at a dynamic place")
    return ctx.fresh(size)


@rule("Gather")
def _gather(ctx: Context, op: Operator) -> Dims:
    x, index = op["0"], op["1"]
    axis = wrap(op.get("axis", 0), len(x.dims))
    before, after = x.dims[:axis], x.dims[axis + 1 :]
    if index.points is None and index.value is not None:
        if index.value.ndim == 1:
            return indexing.select_rows(ctx, x, axis, index)
        ctx.freeze(x.dims[axis], "constant places are taken")
        return (*before, *index.dims, *after)
    if axis == 0 and len(x.dims) == 2:
        return indexing.embedding(ctx, x, index)
    ctx.look_up(x.dims[axis], index, indexing.OUTSIDE)
    ctx.carry(x)
    return (*before, *index.dims, *after)


@rule("GatherElements")
def _gather_elements(ctx: Context, op: Operator) -> Dims:
    x = op["0"]
    return indexing.along(ctx, x, wrap(op.get("axis", 0), len(x.dims)), op["1"])


@rule("GatherND", "ScatterND")
def _by_places(ctx: Context, op: Operator) -> Dims:
    """Places along the leading dimensions at once."""
    if op.get("batch_dims", 0):
        raise RuleError("batch_dims")
    x, index = dims(op, 0), dims(op, 1)
    depth = index[-1].size
    given = op["1"].value
    if op.name.endswith("GatherND") and given is not None and given.shape[1:] == (1,):
        return indexing.select_rows(ctx, op["0"], 0, Operand(index[:1], None, given[:, 0]))
    for e in (*x[:depth], index[-1]):
        ctx.freeze(e, indexing.OUTSIDE)
    if op.name.endswith("GatherND"):
        return (*index[:-1], *x[depth:])
    update = dims(op, 2)
    for e in index[:-1]:
        ctx.freeze(e, "each of its indices is written somewhere")
    for a, b in zip((*index[:-1], *x[depth:]), update, strict=True):
        ctx.unify(a, b)
    return x


@rule("ScatterElements", "Scatter")
def _scatter(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    return indexing.scattered(ctx, x, wrap(op.get("axis", 0), len(x)), op["1"], maybe(op, 2))


@rule("Pad")
def _pad(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    pads = integers(op, "pads", 1) or []
    axes = integers(op, "axes", 3) or list(range(len(x)))
    amounts = [0] * (2 * len(x))
    for j, axis in enumerate(axes):
        place = 2 * (len(x) - 1 - wrap(axis, len(x)))
        amounts[place : place + 2] = pads[j], pads[j + len(axes)]
    mode = op.get("mode", "constant")
    return shape.pad(ctx, x, amounts, mode == "constant", op.out)


@rule("Tile")
def _tile(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    try:
        repeats = integers(op, "repeats", 1) or []
    except RuleError:
        repeats = [s.size // d.size for s, d in zip(op.out, x, strict=True)]
    return shape.tile(ctx, x, repeats, op.out)


@rule("OneHot")
def _one_hot(ctx: Context, op: Operator) -> Dims:
    x = op["0"]
    if wrap(op.get("axis", -1), len(op.out)) != len(op.out) - 1:
        raise RuleError("a one-hot axis that isn't the last")
    return indexing.one_hot(ctx, Operator(op.name, {"0": x}, op.results))
