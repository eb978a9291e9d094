"""Stacks of layers that nobody has named: residual blocks that repeat themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from graphprune.analysis.blocks import Flow
from graphprune.analysis.residual import residual_sums

_COPIES = ("Cast", "Identity")
Chain = list[str]  # residual sums, each computed from the one before


@dataclass(frozen=True, slots=True)
class _Step:
    """One residual block.

    Attributes:
        values: what is computed in it.
        signature: its operators, copies aside.
    """

    values: frozenset[str]
    signature: tuple[tuple[str, int], ...]


def repeated_paths(flow: Flow, products: Collection[str]) -> dict[str, str]:
    """Paths for the values of residual blocks that repeat: "stack0.3" for the fourth of the first.

    A layer may have several blocks (attention, then feed-forward): as many as the repetition
    has a period of.

    Args:
        flow: the graph.
        products: the values that multiply by weights or one another.
    """
    paths = dict.fromkeys(flow.inputs, "")
    count = 0
    for chain, shortcuts in _chains(flow, products):
        steps = _steps(flow, chain, shortcuts)
        start, period, repeats = _repetition([s.signature for s in steps])
        if repeats < 2:
            continue
        for i in range(repeats * period):
            for value in steps[start + i].values:
                paths[value] = f"stack{count}.{i // period}"
        count += 1
    return paths


def _chains(flow: Flow, products: Collection[str]) -> Iterator[tuple[Chain, dict[str, str]]]:
    """Runs of residual sums, with the values that each of these sums takes as they are."""
    outer = [v for v in flow.users if v not in flow.inputs]

    def read(value: str) -> list[str]:
        given = flow.sums[value] if value in flow.sums else flow.inputs.get(value, ())
        return [_original(flow, v) for v in given]

    found = residual_sums([*outer, *flow.inputs], read, flow.sums, products)
    shortcuts = {v: min(read(v), key=lambda n: flow.places.get(n, -1)) for v in found}
    following: dict[str, list[str]] = {}
    for value, shortcut in shortcuts.items():
        before = _back(flow, shortcut, shortcuts)
        if before is not None:
            following.setdefault(before, []).append(value)
    inner = {v for values in following.values() for v in values if len(values) == 1}
    for value in found:
        if value not in inner:
            chain = [value]
            while len(after := following.get(chain[-1], [])) == 1:
                chain.append(after[0])
            yield chain, shortcuts


def _original(flow: Flow, value: str) -> str:
    """What a value is a copy of, in another type perhaps."""
    while value in flow.passes and flow.operators[value] in _COPIES:
        value = flow.passes[value]
    return value


def _back(flow: Flow, value: str, sums: Collection[str]) -> str | None:
    """The sum that runs through norms and the like to `value`."""
    while value not in sums:
        if value not in flow.passes:
            return None
        value = flow.passes[value]
    return value


def _steps(flow: Flow, chain: Chain, shortcuts: Mapping[str, str]) -> list[_Step]:
    """The blocks of a chain, each from where its shortcut leaves to where the next one's does."""
    places = [shortcuts[v] for v in chain]
    places.append(_end(flow, chain, shortcuts))
    steps = []
    for entry, end in pairwise(places):
        values = between(flow, entry, end)
        read = (flow.operators[v] for v in values if v not in flow.sizes)
        kinds = Counter(kind for kind in read if kind not in _COPIES)
        steps.append(_Step(values, tuple(sorted(kinds.items()))))
    return steps


def _end(flow: Flow, chain: Chain, shortcuts: Mapping[str, str]) -> str:
    """Where a chain ends: behind the norm or activation that follows its other sums, if any."""
    last = chain[-1]
    if len(chain) < 2:
        return last
    value, kinds = shortcuts[last], []
    while value != chain[-2]:
        kinds.append(flow.operators[value])
        value = flow.passes[value]
    for kind in reversed(kinds):
        after = [v for v in flow.passes if flow.passes[v] == last and flow.operators[v] == kind]
        if len(after) != 1:
            return chain[-1]
        last = after[0]
    return last


def between(flow: Flow, entry: str, end: str) -> frozenset[str]:
    """What lies on the ways from one value to another, with the second."""
    first, last = flow.places.get(entry, -1), flow.places[end]
    order = list(flow.inputs)[first + 1 : last + 1]
    below = {entry}
    for value in order:
        if not below.isdisjoint(flow.inputs[value]):
            below.add(value)
    above = {end}
    for value in reversed(order):
        if value in above:
            above.update(flow.inputs[value])
    return frozenset((below & above) - {entry})


def _repetition(kinds: Sequence[object]) -> tuple[int, int, int]:
    """The longest run of a pattern: where it starts, its length, and how often it comes.

    Of runs of one length, the shortest pattern and the first start.
    """
    best = (0, 1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        start = 0
        while start + 2 * period <= len(kinds):
            end = start + period
            while end < len(kinds) and kinds[end] == kinds[end - period]:
                end += 1
            repeats = (end - start) // period
            if repeats > 1 and repeats * period > (best[1] * best[2] if best[2] > 1 else 0):
                best = (start, period, repeats)
            start = max(start + 1, end - period + 1)
    return best
