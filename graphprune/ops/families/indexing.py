"""Families that look values up or write them: embedding, gather, index, top-k, scatter, one-hot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphprune.axes import UNIT, Dims, Expr, Select, product
from graphprune.axes.expr import IntArray
from graphprune.ops.context import Context, Operand, Operator, RuleError, Size, Sizes
from graphprune.ops.families.pointwise import axes_of, broadcast, elementwise, reduce_axes, wrap
from graphprune.ops.families.shape import all_frozen, cut
from graphprune.ops.index_types import Points

OUTSIDE = "indexed by values from outside"
WRITTEN = "written at places from outside"
PARTLY = "only its first places are used"


def embedding(ctx: Context, table: Operand, index: Operand) -> Dims:
    """Rows of a table ``[rows, dim]``."""
    ctx.look_up(table.dims[0], index, OUTSIDE)
    ctx.carry(table)
    ctx.hint(table.dims[1], "embedding")
    return (*index.dims, *table.dims[1:])


def take(
    ctx: Context, x: Operand, indices: Sequence[Operand | None], out: Sizes | None = None
) -> Dims:
    """``x[i, :, j]`` with integer tensors; None stands for a full slice.

    Args:
        ctx: inference at the operator.
        x: what is indexed.
        indices: one per leading dimension of `x`.
        out: sizes of the result; None for a write, where they are those of the region written.
    """
    places = [i for i, index in enumerate(indices) if index is not None]
    ctx.carry(x)
    if not places:
        return x.dims
    given = [index for index in indices if index is not None]
    if len(given) == 1 and given[0].points is None and given[0].value is not None and out:
        i = places[0]
        return (*x.dims[:i], chosen(ctx, x.dims[i], given[0].value), *x.dims[i + 1 :])
    for i, index in zip(places, given, strict=True):
        ctx.look_up(x.dims[i], index, OUTSIDE if out is not None else WRITTEN)
    rank = max(len(index.dims) for index in given)
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    rest = [d for i, d in enumerate(x.dims) if i not in places]
    if out is None:
        sizes: Sizes = tuple(
            Size(max(g.dims[-back].size for g in given if len(g.dims) >= back))
            for back in range(rank, 0, -1)
        )
    else:
        sizes = out[at : at + rank]
        if len(rest) + rank != len(out):
            raise RuleError("a boolean index")
    looked_up = broadcast(ctx, [index.dims for index in given], sizes)
    if out is None:
        for e in looked_up:
            ctx.freeze(e, "each of its indices is written somewhere")
    return (*rest[:at], *looked_up, *rest[at:])


def chosen(ctx: Context, e: Expr, places: IntArray) -> Expr:
    """The axis of constant places of `e`: a piece of it, or it re-indexed."""
    places = np.where(places < 0, places + e.size, places)
    if all_frozen(e) or len(np.unique(places)) < len(places):
        ctx.freeze(e, "a table of constant places")
        return ctx.fresh(len(places), "a choice of indices")
    ctx.typing.choices[ctx.node] = (e, places)
    first = int(places[0]) if len(places) else 0
    if np.array_equal(places, np.arange(first, first + len(places))):
        sizes = (first, len(places), e.size - first - len(places))
        pieces = cut(ctx, e, [Size(n) for n in sizes if n])
        return pieces[1 if first else 0]
    return Select(e, places)


def along(ctx: Context, x: Operand, dim: int, index: Operand) -> Dims:
    """gather: ``x`` at `index` along `dim`; the result has the shape of `index`."""
    ctx.look_up(x.dims[dim], index, OUTSIDE)
    ctx.carry(x)
    _aligned(ctx, x.dims, index.dims, skip=dim)
    return index.dims


def along_broadcast(ctx: Context, x: Operand, dim: int, index: Operand, out: Sizes) -> Dims:
    """take_along_dim: as `along`, where either operand may have size 1 in the other dimensions."""
    ctx.look_up(x.dims[dim], index, OUTSIDE)
    ctx.carry(x)
    around = [(*dims[:dim], UNIT, *dims[dim + 1 :]) for dims in (x.dims, index.dims)]
    both = broadcast(ctx, around, (*out[:dim], Size(1), *out[dim + 1 :]))
    return (*both[:dim], index.dims[dim], *both[dim + 1 :])


def select_rows(ctx: Context, x: Operand, dim: int, index: Operand) -> Dims:
    """index_select: a list of places along `dim`."""
    if index.points is None and index.value is not None:
        ctx.carry(x)
        return (*x.dims[:dim], chosen(ctx, x.dims[dim], index.value), *x.dims[dim + 1 :])
    ctx.look_up(x.dims[dim], index, OUTSIDE)
    ctx.carry(x)
    rows = index.dims[0] if index.dims else UNIT
    return (*x.dims[:dim], rows, *x.dims[dim + 1 :])


def scattered(ctx: Context, x: Dims, dim: int, index: Operand, source: Dims | None) -> Dims:
    """scatter: `source` (or a number) is put into `x` at `index` along `dim`."""
    ctx.look_up(x[dim], index, WRITTEN)
    ctx.freeze(index.dims[dim], "each of its indices is written somewhere")
    _aligned(ctx, x, index.dims, skip=dim)
    if source is not None:
        _aligned(ctx, source, index.dims)
    return x


def rows_written(ctx: Context, x: Dims, dim: int, index: Operand, source: Dims | None) -> Dims:
    """index_add, index_copy, index_fill: whole rows of `x`, at a list of places along `dim`."""
    ctx.look_up(x[dim], index, WRITTEN)
    rows = index.dims[0] if index.dims else UNIT
    ctx.freeze(rows, "each of its indices is written somewhere")
    if source:
        _aligned(ctx, (*x[:dim], rows, *x[dim + 1 :]), source)
    return x


def put(ctx: Context, x: Operand, indices: Sequence[Operand | None], values: Dims) -> Dims:
    """index_put: ``x[i, :, j] = values``; the values may broadcast."""
    region = take(ctx, Operand(x.dims), indices)
    for a, b in zip(reversed(region), reversed(values), strict=False):
        if a.size == b.size:
            ctx.unify(a, b)
    return x.dims


def _aligned(ctx: Context, a: Dims, b: Dims, skip: int = -1) -> None:
    """Dimensions at the same place are one axis, unless one of them is only partly used."""
    for i, (e, f) in enumerate(zip(a, b, strict=True)):
        if i == skip:
            continue
        if e.size == f.size:
            ctx.unify(e, f)
        else:
            ctx.freeze(e, PARTLY)
            ctx.freeze(f, PARTLY)


def top_k(ctx: Context, op: Operator) -> list[Dims]:
    """The k largest: values, and places along the axis, which has to keep k indices at least."""
    x = op.operands[0]
    axis = wrap(op.get("dim", -1), len(x.dims))
    kept = ctx.fresh(op.out[axis], "a choice of indices") if x.dims else UNIT
    dims = (*x.dims[:axis], kept, *x.dims[axis + 1 :]) if x.dims else ()
    if x.dims:
        ctx.choose(x.dims[axis], 1, least=op.out[axis].size)
    return [dims for _ in op.results]


def extreme(ctx: Context, op: Operator) -> Dims | list[Dims]:
    """argmax, and max with places: places along the reduced axis, or along all of them in order."""
    x = op.operands[0].dims
    dim = op.get("dim")
    dims = reduce_axes(x, axes_of(dim, len(x)), bool(op.get("keepdim", False)))
    if len(op.results) > 1 or op.name.rpartition(".")[2].startswith("arg"):
        ctx.choose(product(x) if dim is None else x[wrap(dim, len(x))], len(op.results) - 1)
    return [dims for _ in op.results]


def ordered(ctx: Context, op: Operator) -> list[Dims]:
    """sort, argsort: the axis is frozen, as its places are numbered by rank in the result."""
    x = op.operands[0]
    for axis in axes_of(op.get("dim", -1), len(x.dims)):
        ctx.freeze(x.dims[axis], f"{op.name} depends on the places along it")
    if len(op.results) == 2:  # places stay in their order when they are numbered anew
        ctx.carry(x)
    return [x.dims for _ in op.results]


def clamped(ctx: Context, op: Operator) -> Dims:
    """Clamp: of places within an axis, what keeps them within that axis does nothing."""
    x, low, high = op.operands[0], op.get("min"), op.get("max")
    if x.points is not None and not x.points.stored and len(op.operands) == 1:
        size = x.points.axis.size
        if (low is None or low <= 0) and (high is None or high >= size - 1):
            ctx.carry(x)
    return elementwise(ctx, op)


def one_hot(ctx: Context, op: Operator) -> Dims:
    """A new last dimension, of as many indices as the axis that is pointed into."""
    x, last = op.operands[0], op.out[-1]
    if x.points is None or x.points.axis.size != last.size:
        return (*x.dims, ctx.fresh(last, OUTSIDE))
    ctx.look_up(x.points.axis, x, OUTSIDE)
    return (*x.dims, x.points.axis)


def histogram(ctx: Context, op: Operator) -> Dims:
    """Histc with one bin for each place of an axis: how often its values point there."""
    x, bins = op.operands[0], op.out[0]
    whole = x.points is not None and x.points.axis.size == bins.size
    if x.points is None or not whole or (op.get("min"), op.get("max")) != (0, bins.size - 1):
        for e in x.dims:  # a zero in the place of a number would be counted
            ctx.freeze(e, "counted")
        return (ctx.fresh(bins, "bins of numbers"),)
    ctx.look_up(x.points.axis, x, OUTSIDE)
    for e in x.dims:
        ctx.freeze(e, "counted")
    return (x.points.axis,)


def compared(ctx: Context, op: Operator) -> Dims:
    """Comparisons: places along one axis keep their order when it is pruned."""
    found = [o.points for o in op.operands if o.points is not None]
    if len(found) == 2 and not all(p.counted for p in found):
        ctx.look_up(found[0].axis, op.operands[1], OUTSIDE)
        ctx.look_up(found[1].axis, op.operands[0], OUTSIDE)
    return elementwise(ctx, op)


def counted(ctx: Context, op: Operator) -> Dims:
    """Arange over a static size: 0, 1, 2, … along a new axis."""
    dims = constant(ctx, op)
    start, step = op.get("start", 0), op.get("step", 1)
    if len(dims) == 1 and not op.dynamic and (start or 0, step or 1) == (0, 1):
        ctx.given[0] = Points(dims[0], counted=True)
    return dims


def constant(ctx: Context, op: Operator) -> Dims:
    """A new tensor whose values depend on the place, but on nothing else: arange, eye, linspace.

    A slim model has the values at the places that stay, as a constant.
    """
    given = op.operands or op.dynamic or any(s.dynamic for s in op.out)
    ctx.typing.constants.add(ctx.node)
    return tuple(ctx.fresh(s, "its values count its places" if given else None) for s in op.out)


def sorted_into(ctx: Context, x: Dims, boundaries: Dims) -> Dims:
    """bucketize, searchsorted: where the values of `x` belong among sorted boundaries."""
    ctx.freeze(boundaries[-1], "its places are numbered")
    for a, b in zip(boundaries[:-1], x[:-1], strict=False):  # one list for every row, or for all
        ctx.unify(a, b)
    return x
