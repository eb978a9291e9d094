"""The rules of ONNX operators, registered by the files of this folder."""

from graphprune.ops.onnx import (  # noqa: F401  (they register rules)
    contrib,
    layers,
    quantised,
    standard,
)
from graphprune.ops.registry import find_op

__all__ = ["find_op"]
