"""The ATen table, continued: several tensors that are brought to one shape."""

from __future__ import annotations

from graphprune.axes import UNIT, Dims
from graphprune.ops.context import Context, Operator
from graphprune.ops.families.pointwise import broadcast
from graphprune.ops.registry import ATEN

rule = ATEN.rule


@rule("broadcast_tensors")
def _broadcast_tensors(ctx: Context, op: Operator) -> list[Dims]:
    """Every tensor gets the axes that all of them have together."""
    together = broadcast(ctx, [o.dims for o in op["tensors"]], op.out)
    return [together for _ in op.results]


@rule("meshgrid")
def _meshgrid(ctx: Context, op: Operator) -> list[Dims]:
    """One dimension for each vector; with "xy" the first two in the other order."""
    del ctx
    grid = [o.dims[0] if o.dims else UNIT for o in op["tensors"]]
    if op.get("indexing") == "xy" and len(grid) > 1:
        grid[:2] = grid[1::-1]
    return [tuple(grid) for _ in op.results]


@rule("outer", "ger")
def _outer(ctx: Context, op: Operator) -> Dims:
    """A dimension from each vector."""
    del ctx
    a, b = op.operands
    return (*a.dims, *b.dims)
