"""The ATen table, continued: places of images and signals are moved, channels pass through."""

from __future__ import annotations

import math

from graphprune.axes import Atom, Dims, Expr, product
from graphprune.ops.context import Context, Operator, RuleError
from graphprune.ops.families.pointwise import axes_of, elementwise, wrap
from graphprune.ops.families.shape import replace
from graphprune.ops.registry import ATEN

rule = ATEN.rule

_FOURIER = (
    "fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 hfft2 ihfft2 "
    "fftn ifftn rfftn irfftn hfftn ihfftn "
    "fftshift ifftshift"
).split()


@rule(*(f"fft_{name}" for name in _FOURIER), "_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fourier(ctx: Context, op: Operator) -> Dims:
    """A transform along some dimensions, which mixes all of their places."""
    x = op["self"].dims
    dim, sizes = op.get("dim"), op.get("s")
    chosen = range(len(x) - len(sizes), len(x)) if dim is None and sizes else axes_of(dim, len(x))
    for i in chosen:
        ctx.freeze(x[i], "a Fourier transform mixes its places")
    return tuple(ctx.fresh(op.out[i], "frequencies") if i in chosen else d for i, d in enumerate(x))


@rule("im2col")
def _unfold(ctx: Context, op: Operator) -> Dims:
    """Windows of an image as columns: ``[..., channels * kernel places, windows]``."""
    x = op["self"].dims
    for e in x[-2:]:
        ctx.freeze(e, "spatial")
    kernel = [ctx.fresh(k, "the places of a window") for k in op["kernel_size"]]
    return (*x[:-3], product((x[-3], *kernel)), ctx.fresh(op.out[-1], "windows"))


@rule("col2im")
def _fold(ctx: Context, op: Operator) -> Dims:
    """The inverse: what overlaps is summed."""
    x = op["self"].dims
    ctx.freeze(x[-1], "windows")
    kernel = [ctx.fresh(k, "the places of a window") for k in op["kernel_size"]]
    channels = Atom(x[-2].size // math.prod(op["kernel_size"]), ctx.node)
    ctx.unify(x[-2], product((channels, *kernel)))
    return (*x[:-2], channels, *(ctx.fresh(s, "spatial") for s in op.out[-2:]))


@rule(
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in "123"),
    *(f"max_pool{n}d_with_indices" for n in "123"),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in "123"),
    *(f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in "123"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_adaptive_avg_pool2d"),
)
def _spatial(ctx: Context, op: Operator) -> list[Dims]:
    x = op.operands[0].dims
    rank = int(next(c for c in op.name if c.isdigit() and c in "123"))
    for d in x[len(x) - rank :]:
        ctx.freeze(d, "spatial")
    kept = x[: len(x) - rank]
    return [
        (*kept, *(ctx.fresh(s, "spatial") for s in sizes[len(kept) :])) if sizes else ()
        for sizes in op.results
    ]


@rule("diff")
def _diff(ctx: Context, op: Operator) -> Dims:
    x = op["self"].dims
    dim = wrap(op.get("dim", -1), len(x))
    for operand in op.operands:  # what is put before and after `x`, too
        ctx.freeze(operand.dims[dim], "neighbouring places are subtracted")
        for a, b in zip(x, replace(operand.dims, dim, x[dim]), strict=True):
            ctx.unify(a, b)
    return replace(x, dim, ctx.fresh(op.out[dim], "neighbouring places are subtracted"))


@rule("unfold")
def _windows(ctx: Context, op: Operator) -> Dims:
    """Windows along a dimension, each as a new last dimension: that dimension is frozen."""
    x = op["self"].dims
    if not x:
        return (ctx.fresh(op.out[0], "the places of a window"),)
    dim = wrap(op["dimension"], len(x))
    ctx.freeze(x[dim], "windows of neighbouring places")
    windows, places = (ctx.fresh(op.out[i], "windows") for i in (dim, len(x)))
    return (*replace(x, dim, windows), places)


@rule("linalg_cross", "cross")
def _cross(ctx: Context, op: Operator) -> Dims:
    """Cross product: the three coordinates are frozen."""
    x = elementwise(ctx, op)
    dim = op["dim"]
    if dim is None:
        dim = next(i for i, size in enumerate(op.out) if size.size == 3)
    ctx.freeze(x[wrap(dim, len(x))], "coordinates of a cross product")
    return x


@rule("view_as_complex")
def _view_as_complex(ctx: Context, op: Operator) -> Dims:
    x: Dims = op["self"].dims
    ctx.freeze(x[-1], "real and imaginary parts")
    return x[:-1]


@rule("view_as_real")
def _view_as_real(ctx: Context, op: Operator) -> Dims:
    return (*op["self"].dims, ctx.fresh(2, "real and imaginary parts"))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(ctx: Context, op: Operator) -> Dims:
    """Images read at places between pixels that another tensor gives."""
    x, grid = op["input"].dims, op["grid"].dims
    for e in (*x[2:], *grid[1:]):
        ctx.freeze(e, "spatial")
    ctx.unify(x[0], grid[0])
    return (*x[:2], *(ctx.fresh(s, "spatial") for s in op.out[2:]))


@rule("affine_grid_generator")
def _affine_grid(ctx: Context, op: Operator) -> Dims:
    theta = op["theta"].dims
    for e in theta[1:]:
        ctx.freeze(e, "an affine map")
    return (theta[0], *(ctx.fresh(s, "spatial") for s in op.out[1:]))


@rule("max_unpool2d", "max_unpool3d")
def _unpool(ctx: Context, op: Operator) -> Dims:
    """Maxima put back to where `max_pool` found them."""
    x, places = op["self"].dims, op["indices"].dims
    rank = 3 if op.name.endswith("3d") else 2
    for e in (*x[-rank:], *places[-rank:]):
        ctx.freeze(e, "spatial")
    for a, b in zip(x[:-rank], places[:-rank], strict=True):
        ctx.unify(a, b)
    return (*x[:-rank], *(ctx.fresh(s, "spatial") for s in op.out[-rank:]))


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(ctx: Context, op: Operator) -> Dims:
    """Channels ``groups * each`` become ``each * groups``."""
    x, groups = op["self"].dims, op["groups"]
    if x[1].size % groups:
        raise RuleError("channels that don't divide into the groups")
    parts: list[Expr] = [Atom(groups, ctx.node), Atom(x[1].size // groups, ctx.node)]
    ctx.unify(x[1], product(parts))
    return replace(x, wrap(1, len(x)), product(parts[::-1]))
