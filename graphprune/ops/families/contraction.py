"""Families that multiply and sum: linear, matmul, einsum, convolution, attention."""

from __future__ import annotations

from collections.abc import Sequence
from string import digits

from graphprune.axes import UNIT, Atom, Dims, Expr, product
from graphprune.ops.context import Context, RuleError, Size, Sizes
from graphprune.ops.families.pointwise import broadcast


def linear(ctx: Context, x: Dims, weight: Dims, bias: Dims | None) -> Dims:
    """``x @ weight.T + bias`` with weight ``[out, in]``."""
    ctx.unify(x[-1], weight[-1])
    out = x[:-1] + weight[:-1]
    if bias is not None:
        ctx.unify(bias[-1], weight[0])
    ctx.macs((*x[:-1], *weight))
    return out


def matmul(ctx: Context, a: Dims, b: Dims) -> Dims:
    """Matrix product with broadcast batch dimensions; vectors as in numpy."""
    if not a or not b:
        raise RuleError("a matrix product of a scalar")
    row = a[:-1] if len(a) == 1 else a[-2:-1]
    column = b[:0] if len(b) == 1 else b[-1:]
    inner = b[0] if len(b) == 1 else b[-2]
    ctx.unify(a[-1], inner)
    lead = [d[:-2] for d in (a, b)]
    rank = max(map(len, lead))
    sizes = [1] * rank
    for d in lead:
        for i, e in enumerate(reversed(d)):
            sizes[-1 - i] = max(sizes[-1 - i], e.size)
    batch = broadcast(ctx, lead, tuple(Size(s) for s in sizes))
    if len(a) > 2 and len(b) > 2:  # both vary over a batch: attention, not a weight
        for e in batch:
            ctx.hint(e, "heads")
        ctx.hint(a[-1], "qk_dim")
        ctx.hint(column[0], "v_dim")
    ctx.macs((*batch, *row, a[-1], *column))
    return (*batch, *row, *column)


def einsum(ctx: Context, equation: str, operands: Sequence[Dims]) -> Dims:
    """Sum of products by index letters; a letter is one axis."""
    terms, right = _letters(equation, [len(dims) for dims in operands])
    axes: dict[str, Expr] = {}
    for letters, dims in zip(terms, operands, strict=True):
        for letter, e in zip(letters, dims, strict=True):
            known = axes.get(letter)
            if known is None or known.size == 1:
                axes[letter] = e
            elif e.size != 1:
                ctx.unify(known, e)
    summed = [x for x in axes if x not in right]
    if len(terms) > 1:
        ctx.macs(tuple(axes.values()))
        shared = [x for x in axes if all(x in t for t in terms)]
        if min(map(len, terms)) > 2 and any(x in right for x in shared):  # as in `matmul`
            for x in shared:
                ctx.hint(axes[x], "qk_dim" if x in summed else "heads")
            for x in set(right) - set(shared):
                ctx.hint(axes[x], "v_dim")
    return tuple(axes[x] for x in right)


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The index letters of operands and result, an ellipsis written out as digits from the right.

    A result that isn't given has the dimensions of the ellipsis, then the letters that occur once,
    in alphabetical order (capitals first), as in numpy.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise RuleError(f"an einsum of {len(terms)} terms with {len(ranks)} operands")
    named = [len(term.replace("...", "")) for term in terms]
    hidden = [r - n if "..." in t else 0 for t, r, n in zip(terms, ranks, named, strict=True)]
    if max(hidden) > len(digits):
        raise RuleError("an einsum over too many dimensions")
    rest = digits[: max(hidden)][::-1]
    whole = [t.replace("...", rest[len(rest) - n :]) for t, n in zip(terms, hidden, strict=True)]
    if not arrow:
        right = "..." + "".join(sorted(x for x in set(left) - set(",.") if left.count(x) == 1))
    return whole, right.replace("...", rest)


def convolution(
    ctx: Context,
    x: Dims,
    weight: Dims,
    bias: Dims | None,
    *,
    groups: Size,
    transposed: bool,
    still: Sequence[bool],
    out: Sizes,
) -> Dims:
    """Convolution of ``[batch, channels, *spatial]`` (or without batch).

    Args:
        ctx: inference at the operator.
        x: axes of the input.
        weight: ``[out, in / groups, *kernel]``, transposed ``[in, out / groups, *kernel]``.
        bias: ``[out]`` or None.
        groups: number of groups; channels are ``groups * channels per group``.
        transposed: whether it is a transposed convolution.
        still: for every spatial dimension, whether each place depends on itself only.
        out: sizes of the result.

    Returns:
        Axes of the result.
    """
    rank = len(weight) - 2
    channel = len(x) - rank - 1
    for e in weight[2:]:
        ctx.freeze(e, "a convolution kernel")
    for e, stays in zip(x[channel + 1 :], still, strict=True):
        if not stays:
            ctx.freeze(e, "spatial")
    if groups.size == 1 and not groups.dynamic:
        source, target = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
        ctx.unify(x[channel], source)
        loop: tuple[Expr, ...] = (source, target)
    else:
        group = Atom(groups.size, ctx.node)
        if groups.dynamic:
            ctx.freeze(group, "a dynamic number of groups")
        each = weight[0].size // groups.size
        wide = Atom(each, ctx.node) if each != 1 else UNIT
        ctx.unify(weight[0], product((group, wide)))
        inner, outer = (wide, weight[1]) if transposed else (weight[1], wide)
        ctx.unify(x[channel], product((group, inner)))
        target = product((group, outer))
        loop = (group, inner, outer)
    if bias is not None:
        ctx.unify(bias[0], target)
    ctx.hint(x[channel], "channels")
    ctx.hint(target, "channels")
    spatial = tuple(
        e if stays else ctx.fresh(s, "spatial")
        for e, s, stays in zip(x[channel + 1 :], out[channel + 1 :], still, strict=True)
    )
    places = x[channel + 1 :] if transposed else spatial
    ctx.macs((*x[:channel], *places, *loop, *weight[2:]))
    return (*x[:channel], target, *spatial)


def attention(
    ctx: Context,
    q: Dims,
    k: Dims,
    v: Dims,
    mask: Dims | None,
    *,
    grouped: bool,
    causal: bool = False,
) -> Dims:
    """Scaled dot-product attention on ``[..., heads, length, dim]``.

    Args:
        ctx: inference at the operator.
        q: queries ``[..., heads, rows, qk_dim]``.
        k: keys ``[..., kv_heads, columns, qk_dim]``.
        v: values ``[..., kv_heads, columns, v_dim]``.
        mask: bias or mask that broadcasts to ``[..., heads, rows, columns]``, or None.
        grouped: whether each key-value head serves a run of query heads.
        causal: whether rows see only the columns before them.

    Returns:
        Axes ``[..., heads, rows, v_dim]``.
    """
    ctx.unify(q[-1], k[-1])
    ctx.unify(k[-2], v[-2])
    ctx.freeze(k[-2], "its places compete for attention")
    if causal:
        ctx.freeze(q[-2], "causal attention compares places")
    batch = q[:-2]
    if grouped and len(q) > 2 and q[-3].size != k[-3].size:
        repeats = Atom(q[-3].size // k[-3].size, ctx.node)
        ctx.unify(q[-3], product((k[-3], repeats)))
        ctx.unify(k[-3], v[-3])
        lead = [q[:-3], k[:-3], v[:-3]]
        sizes = tuple(Size(e.size) for e in q[:-3])
        batch = (*broadcast(ctx, lead, sizes), q[-3])
    else:
        batch = broadcast(ctx, [d[:-2] for d in (q, k, v)], tuple(Size(e.size) for e in batch))
    if mask is not None:
        scores = (*batch, q[-2], k[-2])
        broadcast(ctx, [scores, mask], tuple(Size(e.size) for e in scores))
    for e in batch:
        ctx.hint(e, "heads")
    ctx.hint(q[-1], "qk_dim")
    ctx.hint(v[-1], "v_dim")
    ctx.macs((*batch, q[-2], k[-2], q[-1]))
    ctx.macs((*batch, q[-2], k[-2], v[-1]))
    return (*batch, q[-2], v[-1])
