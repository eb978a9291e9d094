"""Operator rules: families on axis expressions, and a table per graph format."""

from graphprune.ops.context import Context, Operand, Operator, Rule, RuleError, Size, Sizes, Typing
from graphprune.ops.registry import OpDef, find_op, register_op

__all__ = [
    "Context",
    "OpDef",
    "Operand",
    "Operator",
    "Rule",
    "RuleError",
    "Size",
    "Sizes",
    "Typing",
    "find_op",
    "register_op",
]
