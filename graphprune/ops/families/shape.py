"""Families that only move data: reshape, permute, expand, concatenate, cut, pad, repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphprune.axes import UNIT, Atom, Dims, Expr, Select, Sum, atoms, concat, product, split_at
from graphprune.ops.context import Context, RuleError, Size, Sizes
from graphprune.ops.families.pointwise import wrap


def reshape(ctx: Context, dims: Dims, out: Sizes) -> Dims:
    """Row-major reshape: both sides are the same product of axes."""
    if math.prod(d.size for d in dims) != math.prod(s.size for s in out):
        raise RuleError("the number of elements changes")
    result = tuple(Atom(s.size, ctx.node) if s.size != 1 else UNIT for s in out)
    ctx.unify(product(dims), product(result), "a reshape that regroups its elements")
    return result


def permute(dims: Dims, order: Sequence[int]) -> Dims:
    """Dimensions in a new order."""
    return tuple(dims[wrap(i, len(dims))] for i in order)


def swap(dims: Dims, a: int, b: int) -> Dims:
    """Two dimensions exchanged."""
    order = list(range(len(dims)))
    a, b = wrap(a, len(dims)), wrap(b, len(dims))
    order[a], order[b] = b, a
    return permute(dims, order)


def expand(ctx: Context, dims: Dims, out: Sizes) -> Dims:
    """Broadcast to a larger shape: an expanded dimension is a new axis of equal values."""
    lead = len(out) - len(dims)
    result: list[Expr] = []
    for i, size in enumerate(out):
        source = dims[i - lead] if i >= lead else UNIT
        result.append(source if source.size == size.size else ctx.fresh(size))
    return tuple(result)


def all_frozen(e: Expr) -> bool:
    """Whether no part of `e` can be pruned."""
    return all(a.frozen for a in atoms(e))


def concatenate(ctx: Context, operands: Sequence[Dims], dim: int) -> Dims:
    """Concatenation along `dim`; the other dimensions are shared."""
    operands = [d for d in operands if len(d) != 1 or d[0].size] or list(operands[:1])
    dim = wrap(dim, len(operands[0]))
    first = operands[0]
    for other in operands[1:]:
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            if i != dim:
                ctx.unify(a, b)
    parts = [d[dim] for d in operands]
    whole: Expr
    if all(all_frozen(p) for p in parts):
        whole = ctx.fresh_like(sum(p.size for p in parts), *parts)
    else:
        whole = concat(parts)
    return (*first[:dim], whole, *first[dim + 1 :])


def cut(ctx: Context, e: Expr, sizes: Sequence[Size]) -> list[Expr]:
    """`e` cut into consecutive pieces; frozen where a cut finds no boundary.

    An axis that is frozen as a whole is not divided: nothing is gained, and the parts of a
    dynamic dimension have no fixed sizes.
    """
    if all_frozen(e) or any(s.dynamic for s in sizes):
        ctx.freeze(e, "cut at a dynamic place")
        return [ctx.fresh_like(s, e) for s in sizes]
    pieces: list[Expr] = []
    rest = e
    for size in sizes[:-1]:
        parts = split_at(rest, size.size)
        if parts is None:
            ctx.freeze(e, "cut inside a block of indices that belong together")
            return [ctx.fresh_like(s, e) for s in sizes]
        pieces.append(parts[0])
        rest = parts[1]
    if rest.size != sizes[-1].size:
        raise RuleError("the pieces don't add up")
    return [*pieces, rest]


def replace(dims: Dims, dim: int, e: Expr) -> Dims:
    """`dims` with another axis at `dim`."""
    return (*dims[:dim], e, *dims[dim + 1 :])


def slice_(ctx: Context, dims: Dims, dim: int, start: int, end: int, step: int, out: Size) -> Dims:
    """``x[..., start:end:step]`` along `dim`, bounds already counted from the front."""
    e = dims[dim]
    if (start, end, step) == (0, e.size, 1):
        return dims
    if not out.size:
        return replace(dims, dim, Sum(()))
    if step == 1:
        before, after = Size(start), Size(e.size - end)
        if out.dynamic:
            ctx.freeze(e, "cut at a dynamic place")
            return replace(dims, dim, ctx.fresh(out))
        pieces = cut(ctx, e, [s for s in (before, out, after) if s.size])
        return replace(dims, dim, pieces[1 if start else 0])
    if e.size % step == 0 and start < step and out.size == e.size // step and not all_frozen(e):
        outer = Atom(out.size, ctx.node)
        inner = ctx.fresh(step, "every step-th index is taken")
        ctx.unify(e, product((outer, inner)))
        return replace(dims, dim, outer)
    ctx.freeze(e, "single places are taken")
    return replace(dims, dim, ctx.fresh_like(out, e))


def flip(dims: Dims, chosen: Sequence[int]) -> Dims:
    """Dimensions in reverse order."""
    places = {wrap(i, len(dims)) for i in chosen}
    return tuple(
        Select(e, np.arange(e.size)[::-1]) if i in places and not all_frozen(e) else e
        for i, e in enumerate(dims)
    )


def roll(ctx: Context, dims: Dims, shifts: Sequence[int], chosen: Sequence[int]) -> Dims:
    """Rotation: the last `shift` places of a dimension come first."""
    if not chosen:
        for e in dims:
            ctx.freeze(e, "rolled as one")
    for shift, i in zip(shifts, chosen, strict=False):
        dim = wrap(i, len(dims))
        e = dims[dim]
        last = shift % e.size if e.size else 0
        if last and not all_frozen(e):
            first, rest = cut(ctx, e, [Size(e.size - last), Size(last)])
            dims = replace(dims, dim, concat([rest, first]))
    return dims


def pad(ctx: Context, dims: Dims, amounts: Sequence[int], constant: bool, out: Sizes) -> Dims:
    """Padding, given as in torch: (before, after) pairs from the last dimension backwards."""
    result = list(dims)
    for pair in range(len(amounts) // 2):
        dim = len(dims) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        e = dims[dim]
        if before == after == 0:
            continue
        if not constant or before < 0 or after < 0 or out[dim].dynamic or all_frozen(e):
            ctx.freeze(e, "padding that depends on the places along it")
            result[dim] = ctx.fresh_like(out[dim], e)
        else:
            sides = [ctx.fresh(n) if n else None for n in (before, after)]
            parts = [sides[0], e, sides[1]]
            result[dim] = concat([p for p in parts if p is not None])
    return tuple(result)


def tile(ctx: Context, dims: Dims, repeats: Sequence[int], out: Sizes) -> Dims:
    """The whole tensor repeated: ``copies * axis`` in every repeated dimension."""
    dims = (*(UNIT for _ in range(len(repeats) - len(dims))), *dims)
    return tuple(
        d if n == 1 else product((ctx.fresh(Size(n, size.dynamic and d.size == 1)), d))
        for d, n, size in zip(dims, repeats, out, strict=True)
    )


def repeat_each(ctx: Context, dims: Dims, dim: int, repeats: int) -> Dims:
    """Each index repeated in place: ``axis * copies``."""
    return replace(dims, dim, product((dims[dim], ctx.fresh(repeats))))


def spread(ctx: Context, dims: Dims, channel: int, r: int, out: Sizes) -> Dims:
    """Depth to space (PixelShuffle): channels ``C * r * r`` become ``C`` and larger images."""
    blocks = [ctx.fresh(r, "image blocks") for _ in range(2)]
    for d in dims[channel + 1 :]:
        ctx.freeze(d, "spatial")
    channels = Atom(dims[channel].size // (r * r), ctx.node)
    ctx.unify(dims[channel], product((channels, *blocks)))
    spatial = [ctx.fresh(s, "spatial") for s in out[channel + 1 :]]
    return (*dims[:channel], channels, *spatial)


def gather_blocks(ctx: Context, dims: Dims, channel: int, r: int, out: Sizes) -> Dims:
    """Space to depth (PixelUnshuffle): channels ``C`` become ``C * r * r``."""
    blocks = [ctx.fresh(r, "image blocks") for _ in range(2)]
    for d in dims[channel + 1 :]:
        ctx.freeze(d, "spatial")
    spatial = [ctx.fresh(s, "spatial") for s in out[channel + 1 :]]
    return (*dims[:channel], product((dims[channel], *blocks)), *spatial)
