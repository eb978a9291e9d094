"""Shapes of the results of ONNX Runtime's own operators, which ONNX's inference doesn't know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from graphprune.ops.registry import RuleTable, Shape, ShapeRule

# Inputs that aren't there have the shape ().
RUNTIME = RuleTable[ShapeRule]("shapes", "com.microsoft.")

# The input that each result has the type of, where that isn't the first one for all of them.
TYPES: dict[str, tuple[int, ...]] = {"EmbedLayerNormalization": (2, 0, 2)}

# Inputs whose shapes need not be known: angles of a computed number of places, and lengths.
ASIDE: dict[str, tuple[int, ...]] = {
    "GroupQueryAttention": (5, 6, 7, 8, 9),
    "RotaryEmbedding": (1, 2, 3),
}


_shapes = RUNTIME.rule


# Standard operators whose results have the shape of their first input, and which are functions
# that ONNX's inference doesn't look into (or, the last, that ONNX itself doesn't have).
LIKE_FIRST = frozenset(
    (
        "GroupNormalization MeanVarianceNormalization RMSNormalization RotaryEmbedding Gelu Mish "
        "Swish HardSwish SimplifiedLayerNormalization"
    ).split()
)


def _at(shapes: Sequence[Shape], i: int) -> Shape:
    return shapes[i] if i < len(shapes) else ()


@_shapes(
    "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding", "BiasSoftmax", "Inverse",
    "BiasAdd", "GroupNorm", "MoE",
)  # fmt: skip
def _like_first(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    del attributes
    return [shapes[0]]


@_shapes("BiasSplitGelu")
def _half(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    del attributes
    return [(*shapes[0][:-1], shapes[0][-1] // 2)]


@_shapes("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """The normalised sum, two statistics, and the sum."""
    del attributes
    statistics = (*shapes[0][:-1], 1)
    return [shapes[0], statistics, statistics, shapes[0]]


@_shapes("SkipGroupNorm")
def _skip_groups(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """The normalised sum, and the sum."""
    del attributes
    return [shapes[0], shapes[0]]


@_shapes("EmbedLayerNormalization")
def _embedded(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """The normalised embedding, the number of tokens of each sequence, and the embedding."""
    del attributes
    whole = (*shapes[0], shapes[2][1])
    return [whole, shapes[0][:1], whole]


@_shapes("FusedMatMul", "TransposeMatMul")
def _matmul(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    a, b = (
        tuple(s[i] for i in matrix_order(len(s), side, attributes))
        for s, side in zip(shapes[:2], "AB", strict=True)
    )
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return [(*batch, *a[-2:-1], *b[-1:])]


def matrix_order(rank: int, side: str, attributes: Mapping[str, Any]) -> list[int]:
    """The dimensions of an operand of FusedMatMul in the order in which it multiplies them.

    Args:
        rank: how many there are.
        side: "A" or "B".
        attributes: ``transA`` swaps the last two; before that, ``transBatchA`` brings the first
            one behind the other batch dimensions.
    """
    order = list(range(rank))
    if rank > 2 and attributes.get(f"transBatch{side}"):
        order.insert(rank - 2, order.pop(0))
    if rank > 1 and attributes.get(f"trans{side}"):
        order[-2:] = order[:-3:-1]
    return order


@_shapes("FusedGemm")
def _gemm(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    rows = shapes[0][1 if attributes.get("transA") else 0]
    return [(rows, shapes[1][0 if attributes.get("transB") else 1])]


@_shapes("FusedConv")
def _convolved(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    (batch, _, *space), (out, _, *kernel) = shapes[:2]
    return [(batch, out, *_places(space, kernel, attributes))]


@_shapes("NhwcConv")
def _convolved_last(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Channels last; the layout of the weight is left open."""
    kernel = attributes.get("kernel_shape")
    batch, *space, _ = shapes[0]
    return [(batch, *_places(space, kernel, attributes), shapes[1][0]) if kernel else None]


def _places(
    space: Sequence[int], kernel: Sequence[int], attributes: Mapping[str, Any]
) -> list[int]:
    """The places that a kernel takes in an image."""
    ones = [1] * len(kernel)
    strides, dilations = (attributes.get(n) or ones for n in ("strides", "dilations"))
    pads = attributes.get("pads") or [0] * (2 * len(kernel))
    same = str(attributes.get("auto_pad", "")).startswith("SAME")
    found = []
    for i, (n, k) in enumerate(zip(space, kernel, strict=True)):
        room = n + pads[i] + pads[i + len(kernel)] - dilations[i] * (k - 1) - 1
        found.append(ceil(n / strides[i]) if same else room // strides[i] + 1)
    return found


@_shapes("Attention")
def _attention(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Attention on one input with a fused projection ``[hidden, q + k + v]``."""
    (batch, length, _), past = shapes[0], _at(shapes, 4)
    sizes = attributes.get("qkv_hidden_sizes") or [shapes[1][1] // 3] * 3
    heads = int(attributes["num_heads"])
    total = length + (past[3] if past else 0)
    return [(batch, length, int(sizes[2])), (2, batch, heads, total, int(sizes[0]) // heads)]


@_shapes("MultiHeadAttention")
def _multi_head(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Queries ``[batch, length, width]``, keys and values alike, packed or as in a cache."""
    heads = int(attributes["num_heads"])
    q = shapes[0]
    k = _at(shapes, 1) or q
    v = _at(shapes, 2) or k
    widths = [s[2] // heads if len(s) == 3 else s[-1] for s in (k, v)]
    past = _at(shapes, 6)
    total = (k[2] if len(k) == 4 else k[1]) + (past[2] if past else 0)
    keys, values = ((q[0], heads, total, w) for w in widths)
    return [(*q[:2], heads * widths[1]), keys, values, (q[0], heads, q[1], total)]


@_shapes("GroupQueryAttention")
def _grouped(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Queries ``[batch, length, width]``, or all three packed in one input."""
    heads, others = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    (batch, length, width), past = shapes[0], _at(shapes, 3)
    key = _at(shapes, 1)
    dim = width // (heads if key else heads + 2 * others)
    total = (key[1] if key else length) + (past[2] if past else 0)
    cache = (batch, others, total, dim)
    return [(batch, length, heads * dim), cache, cache, (batch, heads, length, total)]


@_shapes("PackedAttention")
def _packed(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    sizes = attributes.get("qkv_hidden_sizes")
    return [(shapes[0][0], int(sizes[2]) if sizes else shapes[1][1] // 3)]


@_shapes("PackedMultiHeadAttention")
def _packed_heads(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """Tokens ``[tokens, width]``, or all three packed in one input."""
    del attributes
    q, v = shapes[0], _at(shapes, 2)
    return [(q[0], v[1] if v else q[1] * q[-1])]


@_shapes("DecoderMaskedMultiHeadAttention")
def _one_step(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape | None]:
    """One query; keys and values are of this step, or a cache, or packed with the query."""
    heads, (batch, length, width) = int(attributes["num_heads"]), shapes[0]
    k, v, past = (_at(shapes, i) for i in (1, 2, 5))
    if len(v) == 4:
        width = heads * v[3]
    elif v or not k:
        width = v[2] if v else width // 3
    cache = k if len(k) == 4 else past
    step = 0 if attributes.get("past_present_share_buffer") or len(k) == 4 else length
    now = (*cache[:2], cache[2] + step, cache[3]) if cache else None
    return [(batch, length, width), now, now]
