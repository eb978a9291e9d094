"""Unification against hand-worked examples."""

import numpy as np

from graphprune.axes import (
    UNIT,
    Atom,
    Keep,
    Product,
    Ragged,
    Reason,
    Select,
    Sum,
    atoms,
    concat,
    freeze,
    indices,
    mask,
    normal,
    split_at,
    unify,
)

WHY = Reason("test")


def drop(atom: Atom, *gone: int) -> Keep:
    kept = np.ones(atom.size, dtype=bool)
    kept[list(gone)] = False
    return {atom: kept}


def test_an_atom_splits_everywhere_at_once() -> None:
    hidden, heads, dim = Atom(768), Atom(12), Atom(64)
    elsewhere = Sum((hidden, Atom(10)))
    unify(hidden, Product((heads, dim)), WHY)
    assert normal(elsewhere) == Sum((Product((heads, dim)), elsewhere.terms[1]))
    gone = np.flatnonzero(~mask(hidden, drop(heads, 1)))
    assert gone.tolist() == list(range(64, 128))


def test_products_align_through_common_divisors() -> None:
    a, b, c, d = Atom(4), Atom(6), Atom(6), Atom(4)
    unify(Product((a, b)), Product((c, d)), WHY)  # 24 = 2 * 2 * ... against 2 * 3 * ...
    assert all(atom.frozen for atom in atoms(Product((a, b)))) or normal(a) != a


def test_fused_qkv_shares_heads_and_dims() -> None:
    q, k, v = Atom(64), Atom(64), Atom(64)
    three, heads, dim = Atom(3), Atom(4), Atom(16)
    unify(Product((three, heads, dim)), Sum((q, k, v)), WHY)
    assert normal(q) == normal(k) == normal(v) == Product((heads, dim))
    assert not heads.frozen
    assert not dim.frozen
    assert normal(three) == Sum((UNIT, UNIT, UNIT))


def test_heads_of_unequal_groups_keep_their_own_atoms() -> None:
    q, k, v, heads, dim = Atom(8 * 64), Atom(64), Atom(64), Atom(10), Atom(64)
    unify(Product((heads, dim)), Sum((q, k, v)), WHY)
    assert normal(k) is normal(dim)
    assert normal(v) is normal(dim)
    q_heads, q_dim = normal(q).factors
    assert q_dim is normal(dim)
    assert normal(heads) == Sum((q_heads, UNIT, UNIT))


def test_gates_of_a_recurrent_cell_freeze_the_outer_factor() -> None:
    four, hidden = Atom(4), Atom(32)
    halves = tuple(Atom(16) for _ in range(8))
    unify(Product((four, hidden)), Sum(halves), WHY)
    assert four.frozen or normal(four) != four
    left, right = normal(hidden).terms
    assert normal(halves[0]) is left
    assert normal(halves[6]) is left
    assert normal(halves[7]) is right


def test_rotary_pairing_ties_the_two_halves() -> None:
    dim = Atom(64)
    cut = split_at(dim, 32)
    assert cut is not None
    first, second = cut
    unify(Sum((second, first)), dim, WHY)
    assert normal(first) is normal(second)
    assert indices(dim, drop(next(atoms(first)), 3))[[3, 34]].tolist() == [4, 36]


def test_freezing_spreads_through_later_unification() -> None:
    a, b = Atom(8), Atom(8)
    freeze(a, Reason("model output"))
    unify(b, a, WHY)
    assert all(x.frozen for x in atoms(b))
    c, d, e = Atom(8), Atom(2), Atom(4)
    freeze(c, Reason("model output"))
    unify(Product((d, e)), c, WHY)
    assert d.frozen
    assert e.frozen


def test_a_permuted_axis_meets_itself_and_freezes() -> None:
    a = Atom(4)
    unify(a, Select(a, np.array([3, 2, 1, 0])), WHY)
    assert a.frozen


def test_shapes_that_do_not_fit_freeze_both() -> None:
    a, b, c, d = Atom(2), Atom(3), Atom(3), Atom(2)
    unify(Product((a, b)), Product((c, d)), WHY)
    assert all(x.frozen for x in (a, b, c, d))


def test_ragged_masks_keep_their_own_subset_per_outer_index() -> None:
    kv, rep, dim = Atom(2), Atom(3), Atom(2)
    rows = np.array([[True, False, True], [False, True, True]])
    keep: Keep = {rep: Ragged(kv, rows)}
    assert indices(Product((kv, rep, dim)), keep).tolist() == [0, 1, 4, 5, 8, 9, 10, 11]


def test_a_cut_inside_a_block_divides_all_blocks() -> None:
    """Groups of 6 over the concatenation of 4 groups of 4 and 4 of 2: all are made of pairs."""
    a, b = Atom(16), Atom(8)
    unify(a, Product((Atom(4), Atom(4))), WHY)
    unify(b, Product((Atom(4), Atom(2))), WHY)
    unify(concat([a, b]), Product((Atom(4), Atom(6))), WHY)
    pairs = {*atoms(a), *atoms(b)}
    assert [pair.size for pair in pairs if not pair.frozen] == [2]
    (pair,) = (x for x in pairs if not x.frozen)
    assert indices(a, drop(pair, 0)).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert indices(b, drop(pair, 0)).tolist() == [1, 3, 5, 7]


def test_a_cut_that_would_crumble_an_axis_is_not_made() -> None:
    whole = Product((Atom(20), Atom(3)))
    assert split_at(whole, 20) is None
    assert split_at(whole, 21) is not None


def test_a_permutation_of_an_atom_is_undone() -> None:
    order = np.array([2, 0, 1])
    a, b = Atom(3), Atom(3)
    unify(Select(a, order), b, WHY)  # position i of b is index order[i] of a
    assert indices(b, drop(a, 2)).tolist() == [1, 2]
    c, d = Atom(3), Atom(3)
    other = np.array([1, 0, 2])
    unify(Select(c, order), Select(d, other), WHY)
    kept = indices(Select(c, order), drop(next(iter(atoms(c))), 0))
    assert kept.tolist() == indices(Select(d, other), drop(next(iter(atoms(d))), 0)).tolist()
    assert not any(x.frozen for x in (*atoms(c), *atoms(d)))


def test_a_permutation_and_its_inverse_are_the_axis_itself() -> None:
    order = np.array([2, 0, 3, 1])
    a = Atom(4)
    assert normal(Select(Select(a, order), np.argsort(order))) is a
    assert Select(a, order).inverse.tolist() == [1, 3, 0, 2]
    assert Select(a, np.array([0, 0, 1, 2])).inverse is None
    assert Select(a, np.array([0, 1])).inverse is None
