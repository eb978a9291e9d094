"""Sizes that ONNX Runtime's own operators and rotary embeddings carry in attributes."""

from __future__ import annotations

import math

from graphprune.axes import Expr
from graphprune.ops.registry import RuleTable
from graphprune.rewrite.onnx_rewriter import Call, SizeRule

DOMAIN = "com.microsoft."

_rule = RuleTable[SizeRule]("sizes", "onnx.").rule


@_rule(f"{DOMAIN}Attention")
def _attention(call: Call) -> None:
    """Heads, and the three widths, which the operator would take for equal ones."""
    columns = call.dims(1)[1]
    heads = _int(call, "num_heads")
    given = call.node.attributes.get("qkv_hidden_sizes")
    sizes = list(given.as_ints()) if given else [columns.size // 3] * 3
    kept = call.mask(columns)
    starts = (0, sizes[0], sizes[0] + sizes[1])
    now = [int(kept[s : s + n].sum()) for s, n in zip(starts, sizes, strict=True)]
    left = _blocks(call, call.results[0][2], heads)
    if given or len(set(now)) > 1:
        call.set_attribute("qkv_hidden_sizes", now)
    _scale(call, sizes[0] // heads, now[0] // left)
    call.set_attribute("num_heads", left)


@_rule(f"{DOMAIN}MultiHeadAttention")
def _multi_head(call: Call) -> None:
    heads = _int(call, "num_heads")
    query = call.dims(0)
    left = _blocks(call, call.results[0][2], heads)
    if len(query) == 3:
        _scale(call, query[2].size // heads, call.kept(query[2]) // left)
    else:
        _scale(call, query[-1].size, call.kept(query[-1]))
    call.set_attribute("num_heads", left)


@_rule(f"{DOMAIN}GroupQueryAttention")
def _grouped(call: Call) -> None:
    """Heads of queries and of keys; the size of a head never changes."""
    heads, others = _int(call, "num_heads"), _int(call, "kv_num_heads")
    out = call.results[0][2]
    width = out.size // heads
    whole = call.dims(0)[2]
    packed = call.mask(whole)[out.size : out.size + others * width]
    keys = call.mask(call.dims(1)[2]) if call.dims(1) else packed
    call.set_attribute("kv_num_heads", int(keys.reshape(others, -1).any(axis=1).sum()))
    call.set_attribute("num_heads", _blocks(call, out, heads))


@_rule("RotaryEmbedding", f"{DOMAIN}RotaryEmbedding")
def _rotary(call: Call) -> None:
    x = call.dims(0)
    half = call.dims(2 if call.node.domain else 1)[-1]
    heads = _int(call, "num_heads")
    if heads and len(x) == 3:
        call.set_attribute("num_heads", _blocks(call, x[2], heads))
    elif heads:
        call.set_attribute("num_heads", call.kept(x[1]))
    if _int(call, "rotary_embedding_dim"):
        call.set_attribute("rotary_embedding_dim", 2 * call.kept(half))


@_rule(f"{DOMAIN}FusedConv")
def _convolution_groups(call: Call) -> None:
    groups = _int(call, "group", 1)
    if groups > 1:
        call.set_attribute("group", _blocks(call, call.dims(1)[0], groups))


@_rule(f"{DOMAIN}GroupNorm", f"{DOMAIN}SkipGroupNorm")
def _groups_of_norm(call: Call) -> None:
    channels = call.dims(1)[0]
    call.set_attribute("groups", _blocks(call, channels, _int(call, "groups", 1)))


def _blocks(call: Call, e: Expr, blocks: int) -> int:
    """How many of the equal blocks of an axis keep at least one place."""
    return int(call.mask(e).reshape(blocks, -1).any(axis=1).sum())


def _scale(call: Call, before: int, after: int) -> None:
    """Write the scale of scores out where it would follow from another width of heads."""
    given = call.node.attributes.get_float("scale", 0.0)  # 0 stands for the default
    if not given and before != after:
        call.set_attribute("scale", 1 / math.sqrt(before))


def _int(call: Call, name: str, default: int = 0) -> int:
    return int(call.node.attributes.get_int(name, default))
