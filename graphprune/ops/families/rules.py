"""Applying operator rules during inference, whatever graph format the operators come from."""

from __future__ import annotations

import re

from graphprune.axes import Dims
from graphprune.ops import Context, Operator, RuleError
from graphprune.ops.context import Rule
from graphprune.ops.families.pointwise import opaque

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def apply_rule(ctx: Context, op: Operator, rule: Rule | None) -> list[Dims]:
    """The axes of an operator's results; all that it touches is frozen where no rule can tell."""
    if rule is None:
        return opaque(ctx, op, f"no rule for operator {op.name}")
    try:
        given = rule(ctx, op)
        results = given if isinstance(given, list) else [given]
        _check(results, op)
    except RuleError as error:
        return opaque(ctx, op, f"{op.name}: {error}")
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
        return opaque(ctx, op, f"the rule for {op.name} failed: {error!r}")
    return results


def _check(given: list[Dims], op: Operator) -> None:
    """Compare a rule's answer with the sizes that are known."""
    if len(given) != len(op.results):
        raise RuleError(f"the rule gives {len(given)} results, the graph {len(op.results)}")
    for dims, known in zip(given, op.results, strict=True):
        if known is not None and tuple(d.size for d in dims) != tuple(s.size for s in known):
            sizes = [d.size for d in dims], [s.size for s in known]
            raise RuleError(f"the rule gives sizes {sizes[0]}, the graph {sizes[1]}")


def settle_points(ctx: Context, op: Operator, *, carries: bool) -> None:
    """After a rule: points that it left alone are numbers, of an opaque operator all.

    Args:
        ctx: inference at the operator; `given` has what the results point into.
        op: the operator.
        carries: whether its results are values of its first operand, in whatever places.
    """
    known = ctx.node not in ctx.typing.opaque
    if not known:
        ctx.given.clear()
    elif carries:
        ctx.carry(op.operands[0], *range(len(op.results)))
    for operand in op.operands:
        points = operand.points
        if points is not None and not ctx.idle and not (known and points in ctx.taken):
            points.as_numbers(ctx.reason(f"{op.name} computes with indices of it"))


def innermost_line(trace: str) -> str:
    """The innermost line of the model's own code in a stack trace, "file.py:12", or ""."""
    frames = _FRAME.findall(trace)
    own = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    return f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}" if own else ""
