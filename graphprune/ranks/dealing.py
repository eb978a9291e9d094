"""Dealing work to processes, so that none waits long for another."""

from __future__ import annotations

from collections.abc import Sequence


def deal(costs: Sequence[float], hands: int) -> list[int]:
    """Deal items, the most expensive first, each to whoever has least by then.

    It is the rule of the longest processing time, whose longest hand is at most 4/3 of the best
    possible. Equal items go round. Every process gets the same answer.

    Args:
        costs: of every item.
        hands: how many take part, at least 1.

    Returns:
        Of every item, who has it.
    """
    loads = [0.0] * hands
    found = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        hand = min(range(hands), key=lambda h: (loads[h], h))
        found[item] = hand
        loads[hand] += costs[item]
    return found
