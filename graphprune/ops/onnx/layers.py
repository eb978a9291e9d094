"""The ONNX table, continued: images, recurrent layers and attention."""

from __future__ import annotations

from graphprune.axes import UNIT, Atom, Dims, Expr, product
from graphprune.ops.context import Context, Operator, RuleError
from graphprune.ops.families import contraction, shape
from graphprune.ops.onnx.standard import dims, maybe
from graphprune.ops.registry import ONNX

rule = ONNX.rule


@rule("DepthToSpace")
def _depth_to_space(ctx: Context, op: Operator) -> Dims:
    x, r = dims(op, 0), int(op["blocksize"])
    if op.get("mode", "DCR") == "CRD":
        return shape.spread(ctx, x, 1, r, op.out)
    for e in x[2:]:
        ctx.freeze(e, "spatial")
    blocks = [ctx.fresh(r, "image blocks") for _ in range(2)]
    channels = Atom(x[1].size // (r * r), ctx.node)
    ctx.unify(x[1], product((*blocks, channels)))
    return (x[0], channels, *(ctx.fresh(s, "spatial") for s in op.out[2:]))


@rule("SpaceToDepth")
def _space_to_depth(ctx: Context, op: Operator) -> Dims:
    x, r = dims(op, 0), int(op["blocksize"])
    for e in x[2:]:
        ctx.freeze(e, "spatial")
    blocks = [ctx.fresh(r, "image blocks") for _ in range(2)]
    return (x[0], product((*blocks, x[1])), *(ctx.fresh(s, "spatial") for s in op.out[2:]))


@rule(
    "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool",
    "GridSample", "RoiAlign", "MaxRoiPool",
)  # fmt: skip
def _spatial(ctx: Context, op: Operator) -> list[Dims]:
    """Channels pass through, places of the image are moved."""
    for given in op.operands:
        for e in given.dims[2:] if given is op["0"] else given.dims[1:]:
            ctx.freeze(e, "spatial")
    x = dims(op, 0)
    regions = op.name.endswith(("RoiAlign", "MaxRoiPool"))
    batch = dims(op, 1)[0] if regions else x[0]
    if regions:
        ctx.freeze(x[0], "the images of regions")
    elif op.name.endswith("GridSample"):
        ctx.unify(x[0], dims(op, 1)[0])
    if len(op.results) > 1 and op.results[1] is not None:
        ctx.freeze(x[1], "its places in the image are counted through all channels")
    return [
        (batch, x[1], *(ctx.fresh(s, "spatial") for s in sizes[2:])) if sizes else ()
        for sizes in op.results
    ]


@rule("Resize", "Upsample")
def _resize(ctx: Context, op: Operator) -> Dims:
    x = dims(op, 0)
    for other in op.operands[1:]:
        for e in other.dims:
            ctx.freeze(e, "sizes")
    result = list(x)
    for i, (e, size) in enumerate(zip(x, op.out, strict=True)):
        if i > 1 or e.size != size.size:
            ctx.freeze(e, "spatial")
            result[i] = ctx.fresh(size, "spatial")
    return tuple(result)


@rule("LSTM", "GRU", "RNN")
def _recurrent(ctx: Context, op: Operator) -> list[Dims]:
    """``X [steps, batch, in]``; weights ``[directions, gates * hidden, in or hidden]``."""
    if op.get("layout", 0):
        raise RuleError("batch-first layout")
    x, w, r = (dims(op, i) for i in range(3))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op.name.rpartition(".")[2]]
    hidden = r[2]
    ctx.freeze(x[0], "each step continues from the last")
    stacked = product((ctx.fresh(gates, "the gates of a recurrent layer"), hidden))
    ctx.unify(w[1], stacked)
    ctx.unify(r[1], stacked)
    ctx.unify(w[2], x[-1])
    bias, lengths, state, memory, peepholes = (maybe(op, i) for i in range(3, 8))
    if lengths is not None:
        ctx.unify(lengths[0], x[1])
    ctx.freeze(w[0], "directions")
    for given in (r, bias, state, memory, peepholes):
        if given is not None:
            ctx.unify(w[0], given[0])
    if bias is not None:
        both = product((ctx.fresh(2 * gates, "the gates of a recurrent layer"), hidden))
        ctx.unify(bias[1], both)
    if peepholes is not None:
        ctx.unify(peepholes[1], product((ctx.fresh(3, "peepholes"), hidden)))
    for given in (state, memory):
        if given is not None:
            ctx.unify(given[2], hidden)
            ctx.unify(given[1], x[1])
    for weight in (w, r):
        ctx.macs((*x[:2], *weight))
    ctx.hint(hidden, "state")
    last = (w[0], x[1], hidden)
    return [(x[0], w[0], x[1], hidden), last, last][: len(op.results)]


def heads(ctx: Context, e: Expr, count: int) -> tuple[Expr, Expr]:
    """An axis of ``heads * dim`` taken apart."""
    if e.size % count:
        raise RuleError(f"{e.size} channels for {count} heads")
    head = Atom(count, ctx.node) if count != 1 else UNIT
    dim = Atom(e.size // count, ctx.node) if e.size != count else UNIT
    ctx.unify(e, product((head, dim)))
    return head, dim


@rule("Attention")
def _attention(ctx: Context, op: Operator) -> list[Dims]:
    """Opset 23: on ``[batch, heads, length, dim]``, or ``[batch, length, heads * dim]``."""
    q, k, v = (dims(op, i) for i in range(3))
    if maybe(op, 4) is not None or maybe(op, 5) is not None or len(op.results) > 1:
        raise RuleError("a key-value cache or scores as a result")
    flat = len(q) == 3
    if flat:
        counts = (op["q_num_heads"], *[op["kv_num_heads"]] * 2)
        parts = [(x, *heads(ctx, x[2], int(n))) for x, n in zip((q, k, v), counts, strict=True)]
        q, k, v = ((x[0], head, x[1], dim) for x, head, dim in parts)
    causal = bool(op.get("is_causal", 0))
    ctx.freeze(k[2], "the places that attention is paid to")
    out = contraction.attention(ctx, q, k, v, maybe(op, 3), grouped=True, causal=causal)
    return [(out[0], out[2], product((out[1], out[3]))) if flat else out]
