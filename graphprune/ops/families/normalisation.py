"""Normalisations. Their statistics are taken over the kept indices."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import Atom, Dims, product
from graphprune.ops.context import Context


def trailing(ctx: Context, x: Dims, parameters: Sequence[Dims | None]) -> Dims:
    """LayerNorm, RMSNorm: weight and bias have the trailing dimensions of `x`."""
    for p in parameters:
        if p is not None:
            for a, b in zip(x[len(x) - len(p) :], p, strict=True):
                ctx.unify(a, b)
    return x


def per_channel(ctx: Context, x: Dims, parameters: Sequence[Dims | None]) -> Dims:
    """BatchNorm, InstanceNorm: every parameter has the channel axis, dimension 1."""
    for p in parameters:
        if p is not None:
            ctx.unify(x[1], p[0])
    return x


def over_space(ctx: Context, x: Dims) -> None:
    """Freeze the dimensions behind the channels, whose places the statistics run over."""
    for e in x[2:]:
        ctx.freeze(e, "statistics over places")


def grouped(ctx: Context, x: Dims, groups: int, parameters: Sequence[Dims | None]) -> Dims:
    """GroupNorm: channels are ``groups * channels per group``; groups stay equal in size."""
    over_space(ctx, x)
    if groups > 1 and x[1].size != groups:
        inner = Atom(x[1].size // groups, ctx.node)
        ctx.unify(x[1], product((Atom(groups, ctx.node), inner)))
    return per_channel(ctx, x, parameters)
