"""The ONNX table, continued: the operators that ONNX Runtime's optimiser fuses (com.microsoft).

Beside them their standard relatives: rotary embedding, and what ONNX Runtime has put in ONNX's own
domain. Inputs and attributes: ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from graphprune.axes import UNIT, Dims, Expr, concat, product
from graphprune.ops.context import Context, Minimum, Operator, Rule, RuleError, Size
from graphprune.ops.families import contraction, indexing, normalisation, pointwise
from graphprune.ops.families.pointwise import operand
from graphprune.ops.onnx.shapes import matrix_order
from graphprune.ops.onnx.standard import dims, maybe
from graphprune.ops.registry import ONNX, RuleTable, find_op

DOMAIN = "com.microsoft."
PLACES = "the places that attention is paid to"
IN_PLACE = "a key-value cache that is written in place"
PAIR = "the two numbers of a rotary pair"

# Activations that multiply by a gate.
GATED = ("swiglu", "geglu")


RUNTIME = RuleTable[Rule]("axes", DOMAIN)
contrib = RUNTIME.rule


# Attention.


@contrib("Attention")
def _attention(ctx: Context, op: Operator) -> list[Dims]:
    """Attention on one input, whose weight ``[in, q + k + v]`` makes all three."""
    x, weight = dims(op, 0), dims(op, 1)
    sizes = op.get("qkv_hidden_sizes") or [weight[1].size // 3] * 3
    count = int(op["num_heads"])
    if sizes[0] != sizes[1] or any(n % count for n in sizes) or sum(sizes) != weight[1].size:
        raise RuleError(f"queries, keys and values of sizes {sizes} for {count} heads")
    head, qk, v = (ctx.fresh(n) for n in (count, sizes[0] // count, sizes[2] // count))
    whole = concat([product((head, qk)), product((head, qk)), product((head, v))])
    ctx.unify(x[2], weight[0])
    ctx.unify(weight[1], whole)
    bias, mask, past = (maybe(op, i) for i in (2, 3, 4))
    if bias is not None:
        ctx.unify(bias[0], whole)
    if op.get("do_rotary", 0):
        ctx.freeze(qk, "rotated inside of the operator")
    if op.get("past_present_share_buffer", 0):
        raise RuleError(IN_PLACE)
    total = x[1]
    if past is not None:
        ctx.unify(qk, v)
        ctx.unify(past[2], head)
        ctx.unify(past[4], qk)
        _freeze_all(ctx, (past[0], past[3]), "a key-value cache")
        total = ctx.fresh(x[1].size + past[3].size, PLACES)
    _freeze_all(ctx, mask, PLACES)
    ctx.macs((*x[:2], *weight))
    out = _attend(ctx, op, (x[0], head, x[1], qk), (x[0], head, total, qk), v, 5)
    cache = (ctx.fresh(2, "keys and values"), x[0], head, total, qk)
    return [(out[0], out[2], product((out[1], out[3]))), cache][: len(op.results)]


@contrib("MultiHeadAttention")
def _multi_head(ctx: Context, op: Operator) -> list[Dims]:
    """Attention on queries ``[batch, length, heads * dim]``, and keys and values alike.

    Keys and values may be of a cache ``[batch, heads, length, dim]``, or packed with what comes
    before them, ``[batch, length, heads, 2 or 3, dim]``.
    """
    query = dims(op, 0)
    key = maybe(op, 1) or query
    value = maybe(op, 2) or key
    bias, mask, past_key, past_value = (maybe(op, i) for i in (3, 4, 6, 7))
    head = ctx.fresh(int(op["num_heads"]))
    (rows, qk), (total, width), (length, v) = (_parted(ctx, x, head) for x in (query, key, value))
    ctx.unify(total, length)
    ctx.unify(qk, width)
    if bias is not None:
        ctx.unify(bias[0], concat([product((head, qk)), product((head, qk)), product((head, v))]))
    if past_key is not None and past_value is not None:
        for past, e in ((past_key, qk), (past_value, v)):
            ctx.unify(past[1], head)
            ctx.unify(past[3], e)
            _freeze_all(ctx, (past[0], past[2]), "a key-value cache")
        _freeze_all(ctx, (total,), PLACES)
        total = ctx.fresh(total.size + past_key[2].size, PLACES)
    _freeze_all(ctx, mask, PLACES)
    if any(maybe(op, i) is not None for i in (8, 9)):
        raise RuleError(IN_PLACE)
    batch = query[0]
    out = _attend(ctx, op, (batch, head, rows, qk), (batch, head, total, qk), v, 5)
    caches = [(batch, head, total, e) for e in (qk, v)]
    found = [(out[0], out[2], product((out[1], out[3]))), *caches, (batch, head, rows, total)]
    return found[: len(op.results)]


@contrib("GroupQueryAttention")
def _grouped(ctx: Context, op: Operator) -> list[Dims]:
    """Attention where each key-value head serves a run of query heads; the inputs may be packed.

    A group goes with all its queries, or all groups lose as many. ONNX Runtime takes no heads
    whose size isn't a multiple of 8 (of 16 where it rotates them).
    """
    query, key, value = dims(op, 0), maybe(op, 1), maybe(op, 2)
    if any(maybe(op, i) is not None for i in (12, 13)):
        raise RuleError("a quantised key-value cache")
    if op.get("sliding_window_cache", 0):
        raise RuleError(IN_PLACE)
    if any(len(x) != 3 for x in (query, key, value) if x is not None):
        raise RuleError("inputs that aren't [batch, length, width]")
    count, others = int(op["num_heads"]), int(op["kv_num_heads"])
    kv, repeats = ctx.fresh(others), ctx.fresh(count // others)
    head = product((kv, repeats))
    apart = key is not None and value is not None
    size = query[2].size // (count if apart else count + 2 * others)
    dim = ctx.fresh(
        size, "the size of a head, of which ONNX Runtime takes multiples of 8 or 16 only"
    )
    queries, keys = product((head, dim)), product((kv, dim))
    total = query[1]
    if key is not None and value is not None:
        ctx.unify(query[2], queries)
        ctx.unify(key[2], keys)
        ctx.unify(value[2], keys)
        ctx.unify(key[1], value[1])
        total = key[1]
    else:
        ctx.unify(query[2], concat([queries, keys, keys]))
    past = maybe(op, 3), maybe(op, 4)
    for cache in past:
        if cache is not None:
            ctx.unify(cache[1], kv)
            _freeze_all(ctx, (cache[0], cache[2], cache[3]), "a key-value cache")
    _freeze_all(ctx, (query[1], total), PLACES)
    if past[0] is not None or len(op.results) > 1:
        total = ctx.fresh(total.size + (past[0][2].size if past[0] else 0), PLACES)
    for i in (5, 6, 7, 8, 9, 14, 15, 16):
        _freeze_all(ctx, maybe(op, i), PLACES)
    sink = maybe(op, 11)
    if sink is not None:
        ctx.unify(sink[0], head)
    batch = query[0]
    out = _attend(ctx, op, (batch, head, query[1], dim), (batch, kv, total, dim), dim, 10)
    ctx.hint(repeats, "query_heads")
    cached = (batch, kv, total, dim)
    found = [(out[0], out[2], product((out[1], out[3]))), cached, cached]
    return [*found, (batch, head, query[1], total)][: len(op.results)]


@contrib("PackedAttention", "PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention")
def _unproved(ctx: Context, op: Operator) -> Dims:
    """Frozen: ONNX Runtime for the CPU, which proves plans, runs them hardly or not at all."""
    del ctx
    raise RuleError("attention on packed tokens, or on one token, is not supported")


def _attend(ctx: Context, op: Operator, q: Dims, k: Dims, v: Expr, bias: int) -> Dims:
    """Attention on ``[batch, heads, length, dim]``, with a bias of the scores as an input."""
    scores = maybe(op, bias)
    if scores is not None:
        if scores[1].size != 1:
            ctx.unify(scores[1], q[1])
        _freeze_all(ctx, (scores[0], *scores[2:]), PLACES)
    causal = bool(op.get("unidirectional", 0))
    return contraction.attention(ctx, q, k, (*k[:3], v), None, grouped=True, causal=causal)


def _parted(ctx: Context, x: Dims, head: Expr) -> tuple[Expr, Expr]:
    """The length and the width of a head of queries, keys or values in any of their layouts."""
    if len(x) == 5:
        ctx.unify(x[2], head)
        ctx.freeze(x[3], "queries, keys and values")
        return x[1], x[4]
    if len(x) == 4:
        ctx.unify(x[1], head)
        return x[2], x[3]
    if x[2].size % head.size:
        raise RuleError(f"{x[2].size} channels for {head.size} heads")
    dim = ctx.fresh(x[2].size // head.size)
    ctx.unify(x[2], product((head, dim)))
    return x[1], dim


def _freeze_all(ctx: Context, axes: Dims | None, why: str) -> None:
    for e in axes or ():
        ctx.freeze(e, why)


# Rotary embedding.


@ONNX.rule("RotaryEmbedding")
def _rotary_standard(ctx: Context, op: Operator) -> Dims:
    """The two halves of a head's rotated part are one axis, or its neighbours go in pairs."""
    return _rotary(ctx, op, dims(op, 1), dims(op, 2), maybe(op, 3))


@contrib("RotaryEmbedding")
def _rotary_runtime(ctx: Context, op: Operator) -> Dims:
    """The two halves of a head's rotated part are one axis, or its neighbours go in pairs."""
    if op.get("is_packed_batching", 0):
        raise RuleError("sequences packed into one")
    return _rotary(ctx, op, dims(op, 2), dims(op, 3), dims(op, 1))


def _rotary(ctx: Context, op: Operator, cos: Dims, sin: Dims, places: Dims | None) -> Dims:
    """Angles ``[positions, pairs]``, or ``[batch, length, pairs]`` where they need no places."""
    x, half = dims(op, 0), cos[-1]
    part = 2 * half.size
    if op.get("rotary_embedding_dim", 0) not in (0, part):
        raise RuleError("more angles than rotary pairs")
    if len(x) == 4:
        head, length, dim = x[1:]
    else:
        head = ctx.fresh(int(op.get("num_heads", 0)) or x[2].size // part)
        length, dim = _parted(ctx, x, head)
    ctx.unify(half, sin[-1])
    for given in (places, cos[:-1], sin[:-1]):
        if given is not None and [e.size for e in given] == [x[0].size, length.size]:
            ctx.unify(given[0], x[0])
        _freeze_all(ctx, given, "places that angles belong to")
    ctx.freeze(length, "each place is rotated by an angle of its own")
    pairs = ctx.fresh(2, PAIR)
    turned = product((half, pairs)) if op.get("interleaved", 0) else concat([half, half])
    if dim.size < part:
        raise RuleError("more rotary pairs than a head holds")
    rest = [ctx.fresh(dim.size - part)] if dim.size > part else []
    ctx.unify(dim, concat([turned, *rest]))
    return x


# Normalisation.


@contrib("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip_norm(ctx: Context, op: Operator) -> list[Dims]:
    """A residual sum, and its norm over the last dimension; both are results."""
    x = pointwise.broadcast(ctx, [dims(op, 0), dims(op, 1)], op.out)
    normalisation.trailing(ctx, x, [maybe(op, i) for i in range(2, 5)])
    statistics = (*x[:-1], UNIT)
    return [x, statistics, statistics, x][: len(op.results)]


@ONNX.rule("SimplifiedLayerNormalization")
def _root_mean_square(ctx: Context, op: Operator) -> list[Dims]:
    """RMSNorm under the name that ONNX Runtime has given it in ONNX's own domain."""
    return _as("onnx.RMSNormalization", ctx, op)


@contrib("EmbedLayerNormalization")
def _embedding_norm(ctx: Context, op: Operator) -> list[Dims]:
    """The sum of rows of up to three tables, and its norm over the last dimension."""
    ids, words = dims(op, 0), dims(op, 2)
    ctx.freeze(ids[1], "its places are looked up in a table")
    for table, index in ((2, 0), (3, 8), (4, 1)):
        rows, places = operand(op, str(table)), operand(op, str(index))
        if rows is None:
            continue
        if places is None:
            ctx.freeze(rows.dims[0], indexing.PARTLY)
        else:
            ctx.look_up(rows.dims[0], places, indexing.OUTSIDE)
            pointwise.broadcast(ctx, [ids, places.dims], tuple(Size(e.size) for e in ids))
        ctx.unify(rows.dims[1], words[1])
    ctx.hint(words[1], "embedding")
    _freeze_all(ctx, maybe(op, 7), "a mask of tokens")
    whole = normalisation.trailing(ctx, (*ids, words[1]), [maybe(op, 5), maybe(op, 6)])
    return [whole, ids[:1], whole][: len(op.results)]


@contrib("GroupNorm", "SkipGroupNorm")
def _group_norm(ctx: Context, op: Operator) -> list[Dims]:
    """Channels are the last dimension or the second; groups stay equal in size."""
    x = dims(op, 0)
    last = bool(op.get("channels_last", 1))
    channels = x[-1] if last else x[1]
    parameters = [maybe(op, i) for i in (1, 2, 4)]
    normalisation.grouped(
        ctx, (x[0], channels, *(x[1:-1] if last else x[2:])), int(op["groups"]), parameters
    )
    skip = maybe(op, 3)
    if skip is not None:
        ctx.unify(skip[-1] if last or len(skip) == 2 else skip[1], channels)
        ctx.unify(skip[0], x[0])
        _freeze_all(ctx, skip[1:-1] if last else skip[2:], "statistics over places")
    return [x for _ in op.results]


# Products and activations.


@contrib("FusedMatMul", "TransposeMatMul")
def _fused_matmul(ctx: Context, op: Operator) -> Dims:
    """Matrix product of operands that may be transposed."""
    a, b = (
        tuple(x[i] for i in matrix_order(len(x), side, op.arguments))
        for x, side in ((dims(op, 0), "A"), (dims(op, 1), "B"))
    )
    return contraction.matmul(ctx, a, b)


@contrib("FusedGemm")
def _fused_gemm(ctx: Context, op: Operator) -> list[Dims]:
    """Gemm and an activation."""
    return _activated(ctx, _as("onnx.Gemm", ctx, op))


@contrib("FusedConv")
def _fused_convolution(ctx: Context, op: Operator) -> list[Dims]:
    """Convolution, a residual sum and an activation."""
    (out,) = _as("onnx.Conv", ctx, op)
    residual = maybe(op, 3)
    if residual is not None:
        for a, b in zip(out, residual, strict=True):
            ctx.unify(a, b)
    return _activated(ctx, [out])


@contrib("NhwcConv")
def _convolution_channels_last(ctx: Context, op: Operator) -> Dims:
    """Frozen: the layout of its weight depends on what runs it."""
    del ctx
    raise RuleError("the layout of the weight depends on the execution provider")


@contrib("Gelu", "FastGelu", "BiasGelu", "QuickGelu")
def _gelu(ctx: Context, op: Operator) -> list[Dims]:
    """An activation, elementwise, of a sum with a bias in some."""
    return _activated(ctx, [pointwise.elementwise(ctx, op)])


RUNTIME.add("BiasAdd", pointwise.elementwise)


@contrib("BiasSplitGelu")
def _gated(ctx: Context, op: Operator) -> list[Dims]:
    """A sum with a bias; one half of it times an activation of the other."""
    x, bias = dims(op, 0), dims(op, 1)
    half = ctx.fresh(x[-1].size // 2)
    ctx.unify(x[-1], concat([half, half]))
    ctx.unify(bias[0], x[-1])
    return _activated(ctx, [(*x[:-1], half)])


@contrib("MoE")
def _experts(ctx: Context, op: Operator) -> Dims:
    """A mixture of experts: ``fc1 [experts, inner, in]``, ``fc2 [experts, in, inner]``.

    A gate is a third weight like the first, or the other half of the first.
    """
    if op.get("use_sparse_mixer", 0):
        raise RuleError("a sparse mixer")
    x, router, first, second = (dims(op, i) for i in (0, 1, 2, 4))
    third = maybe(op, 6)
    expert, inner = second[0], second[2]
    fusion = int(op.get("swiglu_fusion", 0)) if op.get("activation_type") in GATED else 0
    pair = ctx.fresh(2, "gate and value")
    wide = {0: inner, 1: product((inner, pair)), 2: concat([inner, inner])}[fusion]
    for given, axes in (
        (router, (expert,)),
        (first, (expert, wide, x[-1])),
        (maybe(op, 3), (expert, wide)),
        (second, (expert, x[-1], inner)),
        (maybe(op, 5), (expert, x[-1])),
        (third, (expert, inner, x[-1])),
        (maybe(op, 7), (expert, inner)),
    ):
        if given is not None:
            for a, b in zip(given[-len(axes) :], axes, strict=True):
                ctx.unify(a, b)
    if len(x) == 2:
        ctx.unify(router[0], x[0])
    else:
        ctx.unify(router[0], product(x[:-1]))
    ctx.typing.minima.append(Minimum(expert, int(op.get("k", 1))))
    ctx.hint(expert, "experts")
    ctx.hint(inner, "activation")
    for weight in (first, second, third):
        if weight is not None:
            ctx.macs((*x[:-1], *weight))
    return x


def _activated(ctx: Context, results: list[Dims]) -> list[Dims]:
    for e in results[0]:
        ctx.hint(e, "activation")
    return results


def _as(name: str, ctx: Context, op: Operator) -> list[Dims]:
    """What the rule of another operator, with the same inputs and attributes, says."""
    rule = find_op(name).axes
    if rule is None:
        raise RuleError(f"no rule for {name}")
    found = rule(ctx, op)
    return found if isinstance(found, list) else [found]
