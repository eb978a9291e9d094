"""Operator rules: families on axis expressions, and a table per graph format."""

from graphprune.ops.context import Context, Operand, Operator, Rule, RuleError, Size, Sizes, Typing
from graphprune.ops.registry import RuleTable

__all__ = [
    "Context",
    "Operand",
    "Operator",
    "Rule",
    "RuleError",
    "RuleTable",
    "Size",
    "Sizes",
    "Typing",
]
