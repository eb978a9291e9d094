"""Operator rules: families on axis expressions, and a table per graph format."""

from graphprune.ops import (  # noqa: F401  (they fill the tables)
    aten,
    broadcasting,
    images,
    layers,
    onnx,
    onnx_contrib,
    onnx_layers,
    onnx_quantised,
)
from graphprune.ops.context import Context, Operand, Operator, Rule, RuleError, Size, Sizes, Typing
from graphprune.ops.registry import ATEN, ONNX, RuleTable

__all__ = [
    "ATEN",
    "ONNX",
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
