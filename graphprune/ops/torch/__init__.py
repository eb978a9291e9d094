"""The ATen table: its rules, filled in by the files of this folder."""

from graphprune.ops.registry import ATEN
from graphprune.ops.torch import (  # noqa: F401  (they fill the table)
    aten,
    broadcasting,
    images,
    layers,
)

__all__ = ["ATEN"]
