"""Roles: names that people use for structures, read off the graph.

No role is needed for correctness. The operators leave hints (this axis is a batch of an
attention product, this one a convolution's channels); the residual stream is known from the
layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from graphprune.axes import Atom, atoms
from graphprune.ops import Typing

ROLES = (
    "ffn",
    "hidden",
    "kv_heads",
    "query_heads",
    "qk_dim",
    "v_dim",
    "channels",
    "experts",
    "layers",
)


def assign_roles(
    members: Mapping[Atom, Collection[tuple[str, int]]],
    ranks: Mapping[str, int],
    stream: Collection[Atom],
    typing: Typing,
) -> dict[Atom, str]:
    """The role of every atom.

    Args:
        members: the (parameter, dimension) pairs of each atom.
        ranks: number of dimensions of each parameter.
        stream: atoms of the residual stream.
        typing: the inference's hints.
    """
    hints: dict[Atom, Counter[str]] = defaultdict(Counter)
    heads: list[list[Atom]] = []
    for e, role in typing.hints:
        found = [a for a in dict.fromkeys(atoms(e)) if a in members and not a.frozen]
        for a in found:
            hints[a][role] += 1
        if role == "heads" and found:
            heads.append(found)
    queries = _query_heads(heads, members, typing)
    return {
        atom: _role(hints[atom], pairs, ranks, atom in stream, atom in queries)
        for atom, pairs in members.items()
    }


def _role(
    hints: Counter[str],
    pairs: Collection[tuple[str, int]],
    ranks: Mapping[str, int],
    in_stream: bool,
    is_query: bool,
) -> str:
    if hints["heads"]:
        if any(ranks[p] == 3 and d == 0 for p, d in pairs):
            return "experts"
        return "query_heads" if is_query else "kv_heads"
    linear = sum(ranks[p] == 2 for p, _ in pairs)
    if hints["channels"] and hints["channels"] >= linear:
        return "channels"
    if in_stream or hints["embedding"]:
        return "hidden"
    if hints["qk_dim"]:
        return "qk_dim"
    if hints["v_dim"]:
        return "v_dim"
    return "ffn"


def _query_heads(
    heads: list[list[Atom]],
    members: Mapping[Atom, Collection[tuple[str, int]]],
    typing: Typing,
) -> set[Atom]:
    """Of the atoms that make up one attention's heads, those that keys and values don't have."""

    def occurrences(atom: Atom) -> int:
        return sum(a is atom for p, d in members[atom] for a in atoms(typing.parameters[p][d]))

    queries: set[Atom] = set()
    for group in heads:
        counts = {a: occurrences(a) for a in group}
        queries.update(a for a, n in counts.items() if n < max(counts.values()))
    return queries
