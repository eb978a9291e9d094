"""Maps from positions to units, against an enumeration with explicit loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes import Atom, Expr, Product, Select, Sum, mask, normal
from graphprune.plan.units import NONE, owners, pair_index, pair_sums, unit_index, unit_sums

Place = tuple[tuple[Atom, int], ...]


def places(e: Expr) -> list[Place]:
    """For each position of `e` the (atom, index) pairs that it depends on."""
    match normal(e):
        case Atom() as a:
            return [((a, i),) for i in range(a.size)]
        case Product(factors=factors):
            result: list[Place] = [()]
            for factor in factors:
                result = [left + right for left in result for right in places(factor)]
            return result
        case Sum(terms=terms):
            return [place for term in terms for place in places(term)]
        case Select(base=base, indices=chosen):
            inside = places(base)
            return [inside[i] for i in chosen]


ATOMS = [Atom(2), Atom(3), Atom(4)]


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> Expr:
    kind = draw(st.sampled_from(["atom"] * 2 + ["product", "sum", "select"] * bool(depth)))
    if kind == "atom":
        return draw(st.sampled_from([*ATOMS, Atom(2)]))
    if kind == "select":
        base = draw(expressions(depth - 1))
        size = draw(st.integers(1, 6))
        chosen = draw(st.lists(st.integers(0, base.size - 1), min_size=size, max_size=size))
        return Select(base, np.array(chosen, dtype=np.int64))
    parts = tuple(draw(st.lists(expressions(depth - 1), min_size=2, max_size=3)))
    return Product(parts) if kind == "product" else Sum(parts)


def brute_force(e: Expr, values: np.ndarray, atom: Atom) -> np.ndarray:
    total = np.zeros(atom.size)
    for position, place in enumerate(places(e)):
        for unit in {i for a, i in place if a is atom}:
            total[unit] += values[position]
    return total


@settings(max_examples=300, deadline=None)
@given(expressions(), st.sampled_from(ATOMS), st.integers(0, 2**32 - 1))
def test_sums_equal_the_enumeration(e: Expr, atom: Atom, seed: int) -> None:
    values = np.random.default_rng(seed).random(e.size)
    np.testing.assert_allclose(unit_sums(values, e, atom), brute_force(e, values, atom))


@settings(max_examples=300, deadline=None)
@given(expressions(), st.sampled_from(ATOMS))
def test_a_position_leaves_exactly_with_its_owners(e: Expr, atom: Atom) -> None:
    rows = owners(e, atom)
    for unit in range(atom.size):
        kept = np.arange(atom.size) != unit
        assert np.array_equal((rows == unit).any(axis=0), ~mask(e, {atom: kept}))


@settings(max_examples=200, deadline=None)
@given(expressions(), st.sampled_from(ATOMS))
def test_one_owner_or_an_error(e: Expr, atom: Atom) -> None:
    found = [{i for a, i in place if a is atom} for place in places(e)]
    if any(len(units) > 1 for units in found):
        with pytest.raises(ValueError, match="several units"):
            unit_index(e, atom)
    else:
        assert unit_index(e, atom).tolist() == [next(iter(units), NONE) for units in found]


def test_fused_query_key_value() -> None:
    heads, rep, dim, value = Atom(2), Atom(3), Atom(4), Atom(5)
    q, k = Product((heads, rep, dim)), Product((heads, dim))
    e = Sum((q, k, Product((heads, value))))
    assert (
        unit_index(e, heads).tolist() == [0] * 12 + [1] * 12 + [0] * 4 + [1] * 4 + [0] * 5 + [1] * 5
    )
    assert unit_index(e, rep).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] * 2 + [NONE] * 18
    pairs = pair_index(e, heads, rep)
    assert pairs[:24].tolist() == [h * 3 + r for h in range(2) for r in range(3) for _ in range(4)]
    assert (pairs[24:] == NONE).all()


def test_pairs_equal_the_enumeration() -> None:
    outer, inner, other = Atom(3), Atom(4), Atom(2)
    e = Sum((Product((outer, Sum((inner, inner)), other)), other, Product((outer, inner))))
    values = np.random.default_rng(0).random(e.size)
    expected = np.zeros((3, 4))
    for position, place in enumerate(places(e)):
        found = dict(place)
        if inner in found:
            expected[found[outer], found[inner]] += values[position]
    np.testing.assert_allclose(pair_sums(values, e, outer, inner), expected)


def test_a_flattened_outer_product_counts_each_position_once() -> None:
    a = Atom(3)
    values = np.arange(9, dtype=float)
    expected = [0 + 1 + 2 + 3 + 6, 3 + 4 + 5 + 1 + 7, 6 + 7 + 8 + 2 + 5]
    assert unit_sums(values, Product((a, a)), a).tolist() == expected
