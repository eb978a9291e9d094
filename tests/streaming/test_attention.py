"""Attention in blocks, against sums over single pairs in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graphprune.streaming.torch.attention as module
from graphprune.streaming.torch.attention import ATTENTION, BLOCK, Attention


def brute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Of every head and query: the mean of what it sees, by the exponentials of the products."""
    query, key, value = (x.double() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    mask = mask.broadcast_to(query.shape[:-1] + key.shape[-2:-1])
    out = torch.zeros_like(query)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        b, h, i = place
        weights = torch.exp(scale * key[b, h // groups] @ query[b, h, i]) * mask[b, h, i]
        out[b, h, i] = weights @ value[b, h // groups] / weights.sum()
    return out


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


MASKS = {
    "causal": causal(150, 150)[None, None],
    "longer": causal(150, 160),
    "window": (causal(150, 150) & ~causal(150, 150).tril(-40))[None, None],
    "padding": causal(150, 150) & (torch.arange(150) >= torch.tensor([0, 9])[:, None, None, None]),
    "heads": causal(150, 150) & (torch.arange(4)[:, None, None] + torch.arange(150) > 2),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("heads", [4, 2], ids=["all", "grouped"])
def test_values(kind: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mask = MASKS[kind]
    queries, keys = mask.shape[-2:]
    query = torch.randn(2, 4, queries, 8)
    key, value = (torch.randn(2, heads, keys, 8) for _ in range(2))
    lengths = []

    def counted(q: Tensor, k: Tensor, *rest: Tensor, **named: object) -> Tensor:
        lengths.append(k.shape[-2])
        return ATTENTION(q, k, *rest, **named)

    monkeypatch.setattr(module, "ATTENTION", counted)
    arguments = {"query": query, "key": key, "value": value, "attn_mask": mask, "scale": 0.4}
    found = Attention().attend(arguments | ({"enable_gqa": True} if heads == 2 else {}))
    assert found is not None
    more = keys - queries
    assert lengths == [min(end, queries) + more for end in (BLOCK, 2 * BLOCK, 3 * BLOCK)]
    seen = mask.broadcast_to((*query.shape[:-1], keys)).any(-1)
    wanted = brute(query, key, value, mask, 0.4)
    torch.testing.assert_close(found.double()[seen], wanted[seen], rtol=1e-5, atol=1e-6)
    plain = ATTENTION(query, key, value, mask, scale=0.4, enable_gqa=heads == 2)
    torch.testing.assert_close(found, plain, equal_nan=True)  # where nothing is seen, too


def test_another_mask_has_other_blocks() -> None:
    attention = Attention()
    x = torch.randn(1, 1, 150, 8)
    for mask in (causal(150, 150), causal(150, 150).tril(-3) | torch.eye(150, dtype=torch.bool)):
        found = attention.attend({"query": x, "key": x, "value": x, "attn_mask": mask})
        torch.testing.assert_close(found, ATTENTION(x, x, x, mask))


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(150, 150, dtype=torch.bool),
        causal(150, 150).flip(1),
        torch.zeros(150, 150).masked_fill(~causal(150, 150), -torch.inf),
        torch.ones(1, 150, dtype=torch.bool),
    ],
    ids=["none", "all", "backwards", "numbers", "keys"],
)
def test_the_operator_itself_where_blocks_would_not_pay(mask: Tensor | None) -> None:
    x = torch.randn(1, 1, 150, 8)
    assert Attention().attend({"query": x, "key": x, "value": x, "attn_mask": mask}) is None


def test_few_queries_are_no_blocks() -> None:
    x = torch.randn(1, 1, 2 * BLOCK - 1, 8)
    mask = causal(len(x[0, 0]), len(x[0, 0]))
    assert Attention().attend({"query": x, "key": x, "value": x, "attn_mask": mask}) is None
