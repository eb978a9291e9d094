"""Families that look values up: embedding, gather, index, scatter."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import Dims, Expr
from graphprune.ops.context import Context, RuleError, Size, Sizes
from graphprune.ops.pointwise import broadcast

OUTSIDE = "indexed by values from outside"


def embedding(ctx: Context, table: Dims, index: Dims) -> Dims:
    """Rows of a table ``[rows, dim]``."""
    ctx.freeze(table[0], OUTSIDE)
    ctx.hint(table[1], "embedding")
    return (*index, *table[1:])


def take(ctx: Context, x: Dims, indices: Sequence[Dims | None], out: Sizes) -> Dims:
    """``x[i, :, j]`` with integer tensors; None stands for a full slice."""
    places = [i for i, index in enumerate(indices) if index is not None]
    if not places:
        return x
    for i in places:
        ctx.freeze(x[i], OUTSIDE)
    given = [index for index in indices if index is not None]
    rank = max(map(len, given))
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    rest = [d for i, d in enumerate(x) if i not in places]
    if len(rest) + rank != len(out):
        raise RuleError("a boolean index")
    looked_up = broadcast(ctx, given, out[at : at + rank])
    return (*rest[:at], *looked_up, *rest[at:])


def along(ctx: Context, x: Dims, dim: int, index: Dims) -> Dims:
    """gather: ``x`` at `index` along `dim`; the result has the shape of `index`."""
    ctx.freeze(x[dim], OUTSIDE)
    result: list[Expr] = []
    for i, (a, b) in enumerate(zip(x, index, strict=True)):
        if i != dim and a.size == b.size:
            ctx.unify(a, b)
        elif i != dim:
            ctx.freeze(a, "only its first places are read")
            ctx.freeze(b, "only the first places of another axis are read")
        result.append(b)
    return tuple(result)


def select_rows(ctx: Context, x: Dims, dim: int, size: Size) -> Dims:
    """index_select: a list of places along `dim`."""
    ctx.freeze(x[dim], OUTSIDE)
    return (*x[:dim], ctx.fresh(size, "a choice of indices"), *x[dim + 1 :])


def written(ctx: Context, x: Dims, written_dims: Sequence[int], others: Sequence[Dims]) -> Dims:
    """scatter, index_put: places of `x` are overwritten; all that is written is frozen."""
    for i in written_dims:
        ctx.freeze(x[i], "written at places from outside")
    for dims in others:
        for e in dims:
            ctx.freeze(e, "written at places from outside")
    return x
