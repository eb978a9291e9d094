"""The ONNX table: its rules, filled in by the files of this folder."""

from graphprune.ops.onnx import (  # noqa: F401  (they fill the table)
    contrib,
    layers,
    quantised,
    standard,
)
from graphprune.ops.registry import ONNX

__all__ = ["ONNX"]
