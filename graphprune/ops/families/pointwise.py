"""Families without their own axes: elementwise with broadcasting, reductions, scans, creation."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import UNIT, Dims, Expr, atoms, product
from graphprune.ops.context import Context, Minimum, Operand, Operator, Sizes

RANDOM = "random numbers"
"""Why an axis stays that random numbers are drawn along."""

# Nonlinearities that make a width of features: without one, two linear maps around it are one.
ACTIVATIONS = frozenset(
    f"aten.{_name}"
    for _name in (
        "relu relu_ relu6 gelu silu silu_ mish sigmoid tanh softplus elu elu_ selu celu leaky_relu "
        "leaky_relu_ prelu hardswish hardsigmoid hardtanh hardtanh_ log_sigmoid erf exp exp2 sin "
        "cos abs clamp clamp_min clamp_max threshold glu"
    ).split()
)


def broadcast(ctx: Context, operands: Sequence[Dims], out: Sizes) -> Dims:
    """Elementwise result: dimensions that meet, counted from the right, become one axis.

    Args:
        ctx: inference at the operator.
        operands: the operands' axes.
        out: sizes of the result.

    Returns:
        The axes of the result.
    """
    result: list[Expr] = []
    for back in range(len(out), 0, -1):
        size = out[-back]
        meeting = [d[-back] for d in operands if len(d) >= back and d[-back].size == size.size]
        if not meeting or size.size == 1:
            result.append(meeting[0] if meeting else ctx.fresh(size))
            continue
        for other in meeting[1:]:
            ctx.unify(meeting[0], other)
        result.append(meeting[0])
    return tuple(result)


def elementwise(ctx: Context, op: Operator) -> Dims:
    """An operator that computes each element from the elements at its place."""
    return broadcast(ctx, [o.dims for o in op.operands], op.out)


def elementwise_each(ctx: Context, op: Operator) -> list[Dims]:
    """Likewise, with any number of results."""
    result = elementwise(ctx, op)
    return [result for _ in op.results]


def same(ctx: Context, op: Operator) -> Dims:
    """An operator whose result has the axes of its first tensor operand."""
    del ctx
    return op.operands[0].dims


def wrap(dim: int, rank: int) -> int:
    """`dim` counted from the front."""
    return dim + rank if dim < 0 else dim


def axes_of(dim: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The reduced dimensions, ascending; None and the empty list mean all."""
    if dim is None or (not isinstance(dim, int) and not dim):
        return tuple(range(rank))
    given = (dim,) if isinstance(dim, int) else dim
    return tuple(sorted({wrap(d, rank) for d in given}))


def reduce_axes(dims: Dims, axes: Sequence[int], keepdim: bool) -> Dims:
    """`dims` without `axes`, or with size 1 in their place."""
    kept = [UNIT if i in axes else d for i, d in enumerate(dims) if keepdim or i not in axes]
    return tuple(kept)


def reduction(ctx: Context, op: Operator) -> list[Dims]:
    """A reduction taken over the kept indices: sum, mean, amax, var, logsumexp, norms."""
    x = op.operands[0]
    axes = axes_of(op.get("dim", op.get("dims")), len(x.dims))
    if op.name.rpartition(".")[2].startswith(("var", "std")):
        correction = op.get("correction")
        if correction is None:
            correction = int(op.get("unbiased") is not False)
        if correction >= 1:  # what the sum of squares is divided by has to stay positive
            needed, whole = int(correction) + 1, product([x.dims[i] for i in axes])
            if whole.size >= needed:
                ctx.typing.minima.append(Minimum(whole, needed))
    dims = reduce_axes(x.dims, axes, bool(op.get("keepdim", False)))
    return [dims for _ in op.results]


def frozen_reduction(ctx: Context, op: Operator) -> list[Dims]:
    """A reduction whose result depends on ranks: median, mode."""
    x = op.operands[0]
    axes = axes_of(op.get("dim"), len(x.dims))
    for axis in axes:
        ctx.freeze(x.dims[axis], f"{op.name} depends on the places along it")
    dims = reduce_axes(x.dims, axes, bool(op.get("keepdim", False)))
    return [dims for _ in op.results]


def distribution(ctx: Context, op: Operator) -> Dims:
    """Softmax, over what is kept: the places along its dimension share one whole."""
    x = op.operands[0]
    axis = op.get("dim", op.get("axis", -1))
    if isinstance(axis, int) and x.dims:
        ctx.hint(x.dims[wrap(axis, len(x.dims))], "bins")
    return x.dims


def frozen_along(ctx: Context, op: Operator) -> list[Dims]:
    """Works along a dimension whose places matter: cumprod, cummax."""
    x = op.operands[0]
    dim = op.get("dim", op.get("dims"))
    for axis in axes_of(dim, len(x.dims)):
        ctx.freeze(x.dims[axis], f"{op.name} depends on the places along it")
    return [x.dims for _ in op.results]


def matrix_shaped(ctx: Context, op: Operator) -> Dims:
    """tril, triu: rows and columns are compared by place.

    Places of one axis keep their order when it is pruned, so that a triangle stays one; at a
    distance from the diagonal it does not.
    """
    x = op.operands[0]
    rows, columns = x.dims[-2:]
    kept = (-1, 0) if op.name.endswith("tril") else (0, 1)
    frozen = any(all(a.frozen for a in atoms(e)) for e in (rows, columns))
    if rows.size == columns.size and op.get("diagonal", 0) in kept and not frozen:
        ctx.unify(rows, columns)
        return x.dims
    for d in (rows, columns):
        ctx.freeze(d, f"{op.name} depends on the places along it")
    return x.dims


def uniform(ctx: Context, op: Operator) -> Dims:
    """A new tensor of one value: every dimension is a new axis."""
    return tuple(ctx.fresh(size) for size in op.out)


def drawn(ctx: Context, op: Operator) -> Dims:
    """A new tensor of random numbers: those at the places that stay would be others."""
    return tuple(ctx.fresh(size, RANDOM) for size in op.out)


def opaque(ctx: Context, op: Operator, why: str) -> list[Dims]:
    """An operator of unknown meaning: all axes in and out are frozen."""
    ctx.typing.opaque[ctx.node] = ctx.reason(why)
    for operand in op.operands:
        for d in operand.dims:
            ctx.freeze(d, why)
    return [
        tuple(ctx.fresh(size, why) for size in sizes) if sizes is not None else ()
        for sizes in op.results
    ]


def operand(op: Operator, name: str) -> Operand | None:
    """The tensor argument `name`, or None where it is absent."""
    value = op.get(name)
    return value if isinstance(value, Operand) else None
