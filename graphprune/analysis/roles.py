"""Roles: names that people use for structures, read off the graph.

No role is needed for correctness. The operators leave hints (this axis is a batch of an
attention product, this one a convolution's channels); the residual stream is known from the
layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from functools import cache

from graphprune.axes import Atom, Dims, atoms, enclosed
from graphprune.ops import Typing

ROLES = (
    "ffn",
    "hidden",
    "kv_heads",
    "query_heads",
    "qk_dim",
    "v_dim",
    "channels",
    "bins",
    "latent",
    "expert_groups",
    "experts",
    "layers",
    "attention_blocks",
    "mlp_blocks",
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
        ranks: number of dimensions of each parameter, without those inside its elements.
        stream: atoms of the residual stream.
        typing: the inference's hints.
    """
    hints: dict[Atom, Counter[str]] = defaultdict(Counter)
    for e, role in typing.hints:
        for a in dict.fromkeys(atoms(e)):
            if a in members and not a.frozen:
                hints[a][role] += 1
    queries = _query_heads(typing, members, ranks)
    queries |= {atom for atom in members if hints[atom]["query_heads"]}
    experts = {
        atom
        for atom, pairs in members.items()
        if hints[atom]["experts"]
        or (
            hints[atom]["heads"]
            and any(not d and _is_bank(typing.parameters[p], ranks[p]) for p, d in pairs)
        )
    }
    outer = _outer_factors(experts, members, typing)
    banks = {p for a in experts for p, d in members[a] if d == 0 and ranks[p] > 2}
    roles = {}
    for atom, pairs in members.items():
        if atom in experts:
            roles[atom] = "expert_groups" if atom in outer else "experts"
            continue
        own = hints[atom]
        if any(p in banks for p, _ in pairs):
            # The product with the weights of chosen experts looks like attention, but isn't.
            own = Counter({r: n for r, n in own.items() if r not in ("qk_dim", "v_dim")})
        roles[atom] = _role(own, pairs, ranks, atom in stream, atom in queries)
    return roles


def _is_bank(dims: Dims, rank: int) -> bool:
    """Whether a parameter is a stack of matrices."""
    return rank == 3 and all(e.size > 1 for e in dims)


def _role(
    hints: Counter[str],
    pairs: Collection[tuple[str, int]],
    ranks: Mapping[str, int],
    in_stream: bool,
    is_query: bool,
) -> str:
    if hints["heads"]:
        return "query_heads" if is_query else "kv_heads"
    linear = sum(ranks[p] == 2 for p, _ in pairs)
    if hints["channels"] and hints["bins"]:
        return "bins"  # a distribution that a convolution takes the mean of, as of distances
    if hints["channels"] and hints["channels"] >= linear:
        convolved = sum(ranks[p] > 2 for p, _ in pairs)
        between = hints["activation"] and linear > convolved and not in_stream
        return "ffn" if between else "channels"  # a depthwise convolution inside an ffn
    if in_stream or hints["embedding"] or hints["state"]:
        return "hidden"
    if hints["qk_dim"]:
        return "qk_dim"
    if hints["v_dim"]:
        return "v_dim"
    return "ffn" if hints["activation"] else "latent"


def _outer_factors(
    chosen: set[Atom], members: Mapping[Atom, Collection[tuple[str, int]]], typing: Typing
) -> set[Atom]:
    """Those of `chosen` that have another one inside: groups of experts."""
    found: set[Atom] = set()
    for atom in chosen:
        for p, d in members[atom]:
            inside = [a for a in atoms(typing.parameters[p][d]) if a in chosen]
            found.update(inside[:-1])
    return found


def _owner(parameter: str) -> str:
    """The module around the layer that holds a parameter."""
    return parameter.rpartition(".")[0].rpartition(".")[0]


def _query_heads(
    typing: Typing, members: Mapping[Atom, Collection[tuple[str, int]]], ranks: Mapping[str, int]
) -> set[Atom]:
    """The heads that keys and values don't have.

    The values of such heads are copies: some matrix holds the values' width (or the keys', where
    values have none of their own) without the heads around it.
    """
    widths: dict[str, dict[Atom, set[Atom]]] = {
        "v_dim": defaultdict(set),
        "qk_dim": defaultdict(set),
    }
    heads: list[Atom] = []
    previous = ""
    for e, role in typing.hints:  # an attention hints at its heads first, then at its widths
        found = [a for a in atoms(e) if a in members and not a.frozen]
        if role == "heads":
            heads = [*heads, *found] if previous == "heads" else found
        elif role in widths:
            for head in heads:
                widths[role][head].update(found)
        previous = role

    @cache
    def bare(width: Atom, head: Atom) -> bool:
        own = {_owner(p) for p, _ in members[head]}  # rotary widths are shared by all layers
        return any(
            atom is width and head not in outside
            for p in {p for p, _ in members[width] if ranks[p] > 1 and _owner(p) in own}
            for atom, outside in enclosed(typing.parameters[p])
        )

    queries: set[Atom] = set()
    for head in {*widths["v_dim"], *widths["qk_dim"]}:
        if any(bare(w, head) for w in widths["v_dim"][head] or widths["qk_dim"][head]):
            queries.add(head)
    return queries
