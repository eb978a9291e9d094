"""Shapes of the results of ONNX Runtime's own operators, which ONNX's inference doesn't know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

Shape: TypeAlias = "tuple[int, ...]"
ShapeRule: TypeAlias = "Callable[[Sequence[Shape], Mapping[str, Any]], list[Shape | None]]"

SHAPES: dict[str, ShapeRule] = {}


def _shapes(*names: str) -> Callable[[ShapeRule], ShapeRule]:
    def register(rule: ShapeRule) -> ShapeRule:
        SHAPES.update(dict.fromkeys(names, rule))
        return rule

    return register


# Standard operators whose results have the shape of their first input, and which are functions
# that ONNX's inference doesn't look into.
LIKE_FIRST = frozenset(
    (
        "GroupNormalization MeanVarianceNormalization RMSNormalization Gelu Mish Swish HardSwish"
    ).split()
)


@_shapes(
    "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization",
    "BiasSplitGelu", "BiasSoftmax", "Inverse",
)  # fmt: skip
def _like_first(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    del attributes
    return [shapes[0]]


@_shapes("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """The normalised sum, two statistics that nobody reads, and the sum."""
    del attributes
    return [shapes[0], None, None, shapes[0]]


@_shapes("FusedMatMul")
def _matmul(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    a, b = shapes[0], shapes[1]
    if attributes.get("transA") and len(a) > 1:
        a = (*a[:-2], a[-1], a[-2])
    if attributes.get("transB") and len(b) > 1:
        b = (*b[:-2], b[-1], b[-2])
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return [(*batch, *a[-2:-1], *b[-1:])]


@_shapes("Attention")
def _attention(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Attention on one input with a fused projection ``[hidden, q + k + v]``."""
    sizes = attributes.get("qkv_hidden_sizes")
    width = sizes[2] if sizes else shapes[1][1] // 3
    return [(*shapes[0][:2], int(width))]


@_shapes("MultiHeadAttention")
def _multi_head(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Attention on separate queries ``[batch, length, width]``, keys and values."""
    del attributes
    if len(shapes) > 2 and len(shapes[0]) == len(shapes[2]) == 3:
        return [(*shapes[0][:2], shapes[2][2])]
    return [None]
