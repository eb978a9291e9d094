"""The ATen table: which family each torch operator belongs to, and where its arguments are."""

from __future__ import annotations

from graphprune.axes import UNIT, Dims
from graphprune.ops.context import Context, Operand, Operator, RuleError, Size
from graphprune.ops.families import contraction, indexing, normalisation, pointwise, shape
from graphprune.ops.families.pointwise import operand, wrap
from graphprune.ops.registry import ATEN

rule = ATEN.rule


def _dims(op: Operator, name: str) -> Dims:
    value = operand(op, name)
    if value is None:
        raise RuleError(f"{op.name} without {name}")
    return value.dims


def _first(op: Operator) -> Dims:
    return op.operands[0].dims


def _maybe(op: Operator, name: str) -> Dims | None:
    value = operand(op, name)
    return None if value is None else value.dims


for _name in (
    "to _to_copy contiguous clone detach detach_ alias "
    "type_as lift_fresh_copy lift_fresh lift "
    "float double half bfloat16 cpu cuda resolve_conj resolve_neg positive _conj "
    "fill fill_ zero zero_ zeros_like ones_like full_like empty_like requires_grad_ hardswish "
    "chalf real imag"
).split():
    ATEN.add(f"aten.{_name}", pointwise.same)

for _name in (
    "rsub floor_divide polar copy_ copy complex true_divide heaviside where __and__ __or__ __xor__ "
    "log_sigmoid masked_fill"
).split():
    ATEN.add(f"aten.{_name}", pointwise.elementwise)

for _name in (
    "mean sum amax amin var std logsumexp linalg_vector_norm norm any all nansum "
    "prod var_mean std_mean"
).split():
    ATEN.add(f"aten.{_name}", pointwise.reduction)

for _name in "median mode kthvalue aminmax".split():
    ATEN.add(f"aten.{_name}", pointwise.frozen_reduction)

ATEN.add("aten.cumsum", pointwise.same)

for _name in "softmax log_softmax _softmax _log_softmax _safe_softmax softmin".split():
    ATEN.add(f"aten.{_name}", pointwise.distribution)

for _name in "cumprod logcumsumexp cummax cummin".split():
    ATEN.add(f"aten.{_name}", pointwise.frozen_along)

for _name in "tril triu".split():
    ATEN.add(f"aten.{_name}", pointwise.matrix_shaped)

for _name in "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor".split():
    ATEN.add(f"aten.{_name}", pointwise.uniform)

for _name in "randn rand randint randperm".split():
    ATEN.add(f"aten.{_name}", pointwise.drawn)

for _name in "eye linspace logspace".split():
    ATEN.add(f"aten.{_name}", indexing.constant)

for _name in "eq ne lt le gt ge".split():
    ATEN.add(f"aten.{_name}", indexing.compared)

for _name in "sort argsort".split():
    ATEN.add(f"aten.{_name}", indexing.ordered)

for _name in "argmax argmin".split():
    ATEN.add(f"aten.{_name}", indexing.extreme)

ATEN.add("aten.arange", indexing.counted)
ATEN.add("aten.topk", indexing.top_k)
ATEN.add("aten.one_hot", indexing.one_hot)
for _name in "clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip".split():
    ATEN.add(f"aten.{_name}", indexing.clamped)
ATEN.add("aten.histc", indexing.histogram)

# The values of their results are values of their first operand, in whatever places.
CARRIERS = frozenset(
    f"aten.{_name}"
    for _name in (
        "view reshape _unsafe_view view_as reshape_as flatten unflatten permute transpose t mT "
        "swapaxes swapdims movedim numpy_T squeeze unsqueeze expand expand_as broadcast_to "
        "expand_copy repeat tile repeat_interleave slice narrow slice_copy select select_copy "
        "split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split unbind to _to_copy "
        "contiguous clone detach alias lift_fresh_copy lift_fresh lift cpu cuda float double "
        "type_as"
    ).split()
)


@rule("max", "min")
def _extreme(ctx: Context, op: Operator) -> Dims | list[Dims]:
    if operand(op, "other") is not None:
        return pointwise.elementwise(ctx, op)
    return indexing.extreme(ctx, op)


@rule(
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "view_copy"
)  # fmt: skip
def _reshape(ctx: Context, op: Operator) -> Dims:
    if op.get("dtype") is not None:
        raise RuleError("a view of the same bits as numbers of another type")
    return _like(ctx, shape.reshape(ctx, _dims(op, "self"), op.out), op)


def _like(ctx: Context, dims: Dims, op: Operator) -> Dims:
    """The axes of a result, which are those of the tensor that its shape is taken from, if any."""
    for a, b in zip(dims, _maybe(op, "other") or (), strict=False):
        ctx.unify(a, b)
    return dims


@rule("permute")
def _permute(ctx: Context, op: Operator) -> Dims:
    del ctx
    return shape.permute(_dims(op, "self"), op["dims"])


@rule("transpose", "swapaxes", "swapdims", "transpose_")
def _transpose(ctx: Context, op: Operator) -> Dims:
    del ctx
    a, b = (op.get(x, op.get(y)) for x, y in (("dim0", "axis0"), ("dim1", "axis1")))
    return shape.swap(_dims(op, "self"), a, b)


@rule("t", "numpy_T", "mT", "t_", "adjoint", "mH")
def _reverse(ctx: Context, op: Operator) -> Dims:
    del ctx
    x = _dims(op, "self")
    return x[::-1] if op.name.endswith(("t", "T", "t_")) and len(x) <= 2 else shape.swap(x, -2, -1)


@rule("movedim")
def _movedim(ctx: Context, op: Operator) -> Dims:
    del ctx
    x = _dims(op, "self")
    pairs = []
    for key in ("source", "destination"):
        given = op[key]
        given = [given] if isinstance(given, int) else list(given)
        pairs.append([wrap(d, len(x)) for d in given])
    moved = dict(zip(pairs[1], pairs[0], strict=True))
    rest = iter([i for i in range(len(x)) if i not in pairs[0]])
    return tuple(x[moved[i] if i in moved else next(rest)] for i in range(len(x)))


@rule("squeeze", "squeeze_")
def _squeeze(ctx: Context, op: Operator) -> Dims:
    del ctx
    x = _dims(op, "self")
    dim = op.get("dim")
    chosen = range(len(x)) if dim is None else pointwise.axes_of(dim, len(x))
    return tuple(d for i, d in enumerate(x) if i not in chosen or d.size != 1)


@rule("unsqueeze", "unsqueeze_")
def _unsqueeze(ctx: Context, op: Operator) -> Dims:
    del ctx
    x = _dims(op, "self")
    dim = wrap(op["dim"], len(x) + 1)
    return (*x[:dim], UNIT, *x[dim:])


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(ctx: Context, op: Operator) -> Dims:
    return _like(ctx, shape.expand(ctx, _dims(op, "self"), op.out), op)


@rule("repeat", "tile")
def _repeat(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    repeats = list(op.get("repeats") or op.get("dims") or [])
    return shape.tile(ctx, x, [1] * (len(x) - len(repeats)) + repeats, op.out)


@rule("repeat_interleave")
def _repeat_interleave(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    repeats, dim = op["repeats"], op["dim"]
    if dim is None:
        raise RuleError("a repeat_interleave of a flattened tensor")
    dim = wrap(dim, len(x))
    if isinstance(repeats, int):
        return shape.repeat_each(ctx, x, dim, repeats)
    for e in (x[dim], *repeats.dims):
        ctx.freeze(e, "repeated as often as another tensor says")
    return shape.replace(x, dim, ctx.fresh_like(op.out[dim], x[dim]))


@rule("cat", "concat", "concatenate")
def _cat(ctx: Context, op: Operator) -> Dims:
    return shape.concatenate(ctx, [o.dims for o in op["tensors"]], op["dim"])


@rule("stack")
def _stack(ctx: Context, op: Operator) -> Dims:
    operands = [o.dims for o in op["tensors"]]
    dim = wrap(op.get("dim", 0), len(operands[0]) + 1)
    for other in operands[1:]:
        for a, b in zip(operands[0], other, strict=True):
            ctx.unify(a, b)
    first = operands[0]
    return (*first[:dim], ctx.fresh(len(operands), "a stack of tensors"), *first[dim:])


@rule(
    "split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split",
    "split_copy", "split_with_sizes_copy",
)  # fmt: skip
def _split(ctx: Context, op: Operator) -> list[Dims]:
    x = _dims(op, "self")
    dim = wrap(op.get("dim", 0), len(x))
    sizes = [result[dim] for result in op.results if result is not None]
    return [shape.replace(x, dim, e) for e in shape.cut(ctx, x[dim], sizes)]


@rule("unbind", "unbind_copy")
def _unbind(ctx: Context, op: Operator) -> list[Dims]:
    x = _dims(op, "self")
    dim = wrap(op.get("dim", 0), len(x))
    ctx.freeze(x[dim], "taken apart index by index")
    return [(*x[:dim], *x[dim + 1 :]) for _ in op.results]


@rule("select", "select_copy")
def _select(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    dim = wrap(op["dim"], len(x))
    ctx.freeze(x[dim], "a single index is taken")
    return (*x[:dim], *x[dim + 1 :])


@rule("slice", "narrow", "slice_copy")
def _slice(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    dim = wrap(op.get("dim", 0), len(x))
    start, end = _bounds(op, x[dim].size)
    return shape.slice_(ctx, x, dim, start, end, op.get("step", 1), op.out[dim])


def _bounds(op: Operator, size: int) -> tuple[int, int]:
    """Where a slice of a dimension of `size` begins and ends, counted from the front."""
    start = op.get("start") or 0
    if not isinstance(start, int):
        raise RuleError("a slice from a place in a tensor")
    end = op.get("end")
    if op.name.endswith("narrow"):
        start = wrap(start, size)
        end = start + op["length"]
    end = size if end is None else min(wrap(end, size), size)
    start = max(wrap(start, size), 0)
    return start, max(end, start)


@rule("flip")
def _flip(ctx: Context, op: Operator) -> Dims:
    del ctx
    return shape.flip(_dims(op, "self"), op["dims"])


@rule("roll")
def _roll(ctx: Context, op: Operator) -> Dims:
    return shape.roll(ctx, _dims(op, "self"), op["shifts"], op.get("dims") or [])


@rule("pad", "constant_pad_nd")
def _pad(ctx: Context, op: Operator) -> Dims:
    constant = op.get("mode", "constant") == "constant"
    return shape.pad(ctx, _dims(op, "self"), op["pad"], constant, op.out)


@rule("pixel_shuffle")
def _pixel_shuffle(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    return shape.spread(ctx, x, len(x) - 3, op["upscale_factor"], op.out)


@rule("pixel_unshuffle")
def _pixel_unshuffle(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    return shape.gather_blocks(ctx, x, len(x) - 3, op["downscale_factor"], op.out)


@rule("glu")
def _glu(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    dim = wrap(op.get("dim", -1), len(x))
    half = Size(x[dim].size // 2)
    value, gate = shape.cut(ctx, x[dim], [half, half])
    ctx.unify(value, gate)
    return shape.replace(x, dim, value)


@rule("linear")
def _linear(ctx: Context, op: Operator) -> Dims:
    return contraction.linear(ctx, _dims(op, "input"), _dims(op, "weight"), _maybe(op, "bias"))


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(ctx: Context, op: Operator) -> Dims:
    operands = op.operands
    return contraction.matmul(ctx, operands[0].dims, operands[1].dims)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(ctx: Context, op: Operator) -> Dims:
    bias, a, b = (o.dims for o in op.operands)
    product = contraction.matmul(ctx, a, b)
    if op.name == "aten.addbmm":  # which sums over its batch
        product = product[1:]
    return pointwise.broadcast(ctx, [product, bias], op.out)


@rule("einsum")
def _einsum(ctx: Context, op: Operator) -> Dims:
    return contraction.einsum(ctx, op["equation"], [o.dims for o in op["tensors"]])


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d")
def _convolution(ctx: Context, op: Operator) -> Dims:
    return contraction.convolution(
        ctx,
        _dims(op, "input"),
        _dims(op, "weight"),
        _maybe(op, "bias"),
        groups=Size(op.get("groups", 1), "groups" in op.dynamic),
        transposed="transpose" in op.name or bool(op.get("transposed", False)),
        still=_still(op),
        out=op.out,
    )


def _still(op: Operator) -> list[bool]:
    """Which spatial dimensions of a convolution have a window of one place, moved by one."""
    kernel = [e.size for e in _dims(op, "weight")[2:]]

    def each(name: str, default: int) -> list[int]:
        value = op.get(name, default)
        value = 0 if isinstance(value, str) else value  # "same" and "valid" at a single place
        given = [value] if isinstance(value, int) else list(value)
        return given * len(kernel) if len(given) == 1 else given

    options = (each("stride", 1), each("padding", 0), each("output_padding", 0))
    return [(k, *at) == (1, 1, 0, 0) for k, *at in zip(kernel, *options, strict=True)]


ATEN.add("aten.conv_transpose3d", _convolution)


@rule("scaled_dot_product_attention")
def _attention(ctx: Context, op: Operator) -> Dims:
    if op.get("dropout_p"):  # a number for every weight of the attention
        for e in (*_dims(op, "query")[:-1], *_dims(op, "key")[:-1]):
            ctx.freeze(e, pointwise.RANDOM)
    return contraction.attention(
        ctx,
        _dims(op, "query"),
        _dims(op, "key"),
        _dims(op, "value"),
        _maybe(op, "attn_mask"),
        grouped=bool(op.get("enable_gqa", False)),
        causal=bool(op.get("is_causal", False)),
    )


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _trailing_norm(ctx: Context, op: Operator) -> Dims | list[Dims]:
    parameters = [_maybe(op, "weight"), _maybe(op, "bias")]
    x = normalisation.trailing(ctx, _dims(op, "input"), parameters)
    n = len(op["normalized_shape"])
    statistics = (*x[: len(x) - n], *(UNIT for _ in range(n)))
    return x if len(op.results) == 1 else [x, statistics, statistics]


@rule(
    "batch_norm",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "_batch_norm_no_update",
    "instance_norm",
    "cudnn_batch_norm",
)
def _channel_norm(ctx: Context, op: Operator) -> list[Dims]:
    names = ("weight", "bias", "running_mean", "running_var")
    x = normalisation.per_channel(ctx, _first(op), [_maybe(op, n) for n in names])
    if "instance" in op.name:
        normalisation.over_space(ctx, x)
    if op.get("training"):
        for e in (x[0], *x[2:]):
            ctx.freeze(e, "statistics over places")
    found: list[Dims] = [x]
    for sizes in op.results[1:]:
        per_channel = sizes is not None and [s.size for s in sizes] == [x[1].size]
        found.append(x[1:2] if per_channel else tuple(ctx.fresh(s, "unused") for s in sizes or ()))
    return found


@rule("group_norm")
def _group_norm(ctx: Context, op: Operator) -> Dims:
    parameters = [_maybe(op, "weight"), _maybe(op, "bias")]
    return normalisation.grouped(ctx, _dims(op, "input"), op["num_groups"], parameters)


@rule("embedding")
def _embedding(ctx: Context, op: Operator) -> Dims:
    return indexing.embedding(ctx, op["weight"], op["indices"])


@rule("index")
def _index(ctx: Context, op: Operator) -> Dims:
    given = [i if isinstance(i, Operand) else None for i in op["indices"]]
    return indexing.take(ctx, op["self"], given, op.out)


@rule("bucketize", "searchsorted")
def _sorted_into(ctx: Context, op: Operator) -> Dims:
    boundaries = "boundaries" if op.name.endswith("bucketize") else "sorted_sequence"
    if operand(op, "sorter") is not None:
        raise RuleError("boundaries that another tensor sorts")
    return indexing.sorted_into(ctx, _dims(op, "self"), _dims(op, boundaries))


@rule("take_along_dim")
def _take_along(ctx: Context, op: Operator) -> Dims:
    """gather, after both operands are broadcast everywhere but along `dim`."""
    x, index = op["self"], op["indices"]
    if op.get("dim") is None:
        raise RuleError("a take_along_dim of a flattened tensor")
    return indexing.along_broadcast(ctx, x, wrap(op["dim"], len(x.dims)), index, op.out)


@rule("gather")
def _gather(ctx: Context, op: Operator) -> Dims:
    x = op["self"]
    return indexing.along(ctx, x, wrap(op["dim"], len(x.dims)), op["index"])


@rule("index_select")
def _index_select(ctx: Context, op: Operator) -> Dims:
    x = op["self"]
    return indexing.select_rows(ctx, x, wrap(op["dim"], len(x.dims)), op["index"])


@rule("index_put", "index_put_", "_unsafe_index_put")
def _index_put(ctx: Context, op: Operator) -> Dims:
    given = [i if isinstance(i, Operand) else None for i in op["indices"]]
    return indexing.put(ctx, op["self"], given, _dims(op, "values"))


@rule("scatter", "scatter_", "scatter_add", "scatter_reduce")
def _scatter(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    return indexing.scattered(ctx, x, wrap(op["dim"], len(x)), op["index"], _maybe(op, "src"))


@rule("index_add", "index_copy", "index_fill", "index_reduce")
def _rows_written(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    dim = wrap(op["dim"], len(x))
    return indexing.rows_written(ctx, x, dim, op["index"], _maybe(op, "source"))


@rule("slice_scatter")
def _slice_scatter(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    dim = wrap(op.get("dim", 0), len(x))
    start, end = _bounds(op, x[dim].size)
    source = _dims(op, "src")
    size = Size(source[dim].size, dynamic="start" in op.dynamic or "end" in op.dynamic)
    piece = shape.slice_(ctx, x, dim, start, end, op.get("step", 1), size)
    for a, b in zip(piece, source, strict=True):
        ctx.unify(a, b)
    return x


@rule("select_scatter")
def _select_scatter(ctx: Context, op: Operator) -> Dims:
    x = _dims(op, "self")
    dim = wrap(op["dim"], len(x))
    ctx.freeze(x[dim], "a single index is written")
    for a, b in zip((*x[:dim], *x[dim + 1 :]), _dims(op, "src"), strict=True):
        ctx.unify(a, b)
    return x
