"""The rules of ATen operators, registered by the files of this folder."""

from graphprune.ops.registry import find_op
from graphprune.ops.torch import (  # noqa: F401  (they register rules)
    aten,
    broadcasting,
    images,
    layers,
)

__all__ = ["find_op"]
