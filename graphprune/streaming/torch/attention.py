"""Attention in blocks of queries, each without the keys that none of its queries may see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
BLOCK = 64  # queries: on processors, smaller blocks skip no more than their calls cost
WORTH = 0.8  # of all pairs of queries and keys, at most, for blocks to pay


class Attention:
    """Scaled dot-product attention on a processor.

    A mask that a graph computes says nothing of its form, so that a kernel goes through all keys,
    twice as many as under a causal mask count.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._mask: Tensor | None = None
        self._ends: list[int] = []

    def attend(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The result in blocks, or None where they don't pay.

        Args:
            arguments: of the operator, by name: query [..., queries, width], key and value
                [..., keys, width], attn_mask bool [..., queries, keys], True for what is seen.
        """
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        mask = arguments.get("attn_mask")
        if (
            mask is None
            or mask.dtype != torch.bool
            or query.device.type != "cpu"
            or arguments.get("dropout_p")
            or mask.shape[-2:] != (query.shape[-2], key.shape[-2])
            or query.shape[-2] < 2 * BLOCK
        ):
            return None
        queries, masks = torch.split(query, BLOCK, -2), torch.split(mask, BLOCK, -2)
        ends = self._known(mask)
        pairs = sum(q.shape[-2] * end for q, end in zip(queries, ends, strict=True))
        if pairs > WORTH * query.shape[-2] * key.shape[-2]:
            return None
        rest = {k: arguments[k] for k in ("scale", "enable_gqa") if k in arguments}
        found = [
            ATTENTION(q, key[..., :end, :], value[..., :end, :], m[..., :end], **rest)
            for q, m, end in zip(queries, masks, ends, strict=True)
        ]
        return torch.cat(found, -2)

    def _known(self, mask: Tensor) -> list[int]:
        """`_ends` of a mask. The layers of a model share one."""
        if self._mask is not mask:
            self._mask, self._ends = mask, _ends(mask)
        return self._ends


def _ends(mask: Tensor) -> list[int]:
    """For every block of queries, the number of keys up to the last that one of them sees."""
    places = torch.arange(1, mask.shape[-1] + 1, dtype=torch.int32)
    last = torch.where(mask, places, 1).amax(-1).reshape(-1, mask.shape[-2]).amax(0)
    return [int(block.max()) for block in torch.split(last, BLOCK)]
