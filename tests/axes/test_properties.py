"""Properties of unification over random axes: soundness, termination, independence of order."""

import random
from collections.abc import Callable

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphprune.axes import Atom, Expr, Product, Reason, Sum, atoms, mask, unify

WHY = Reason("test")

Pool = list[Atom]


@st.composite
def expressions(draw: st.DrawFn, size: int, pool: Pool, depth: int = 3) -> Expr:
    """A random expression of the given size over fresh atoms and those of the pool."""
    same = [a for a in pool if a.size == size]
    divisors = [d for d in range(2, size) if size % d == 0]
    kinds = ["new"] + ["old"] * bool(same) * 2
    if depth and size > 1:
        kinds += ["sum"] + ["product"] * bool(divisors) * 2
    match draw(st.sampled_from(kinds)):
        case "old":
            return draw(st.sampled_from(same))
        case "sum":
            cut = draw(st.integers(1, size - 1))
            return Sum(
                (
                    draw(expressions(cut, pool, depth - 1)),
                    draw(expressions(size - cut, pool, depth - 1)),
                )
            )
        case "product":
            front = draw(st.sampled_from(divisors))
            return Product(
                (
                    draw(expressions(front, pool, depth - 1)),
                    draw(expressions(size // front, pool, depth - 1)),
                )
            )
    atom = Atom(size)
    pool.append(atom)
    return atom


@st.composite
def problems(draw: st.DrawFn) -> list[tuple[Expr, Expr]]:
    """A few pairs of axes of equal size that share atoms."""
    pool: Pool = []
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12, 24]), min_size=1, max_size=4))
    return [(draw(expressions(n, pool)), draw(expressions(n, pool))) for n in sizes]


def free_atoms(exprs: list[Expr]) -> list[Atom]:
    found = dict.fromkeys(a for e in exprs for a in atoms(e))
    return [a for a in found if not a.frozen]


@settings(max_examples=300, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_unified_axes_keep_the_same_indices_under_every_plan(
    pairs: list[tuple[Expr, Expr]], rng: random.Random
) -> None:
    for a, b in pairs:
        unify(a, b, WHY)
    keep = {}
    for atom in free_atoms([e for pair in pairs for e in pair]):
        keep[atom] = np.array([rng.random() < 0.6 for _ in range(atom.size)])
    for a, b in pairs:
        assert np.array_equal(mask(a, keep), mask(b, keep))


def rebuild(pairs: list[tuple[Expr, Expr]]) -> Callable[[], list[tuple[Expr, Expr]]]:
    """A maker of copies of `pairs` over fresh atoms, before any unification."""

    def copy() -> list[tuple[Expr, Expr]]:
        fresh: dict[Atom, Atom] = {}

        def visit(e: Expr) -> Expr:
            match e:
                case Atom():
                    return fresh.setdefault(e, Atom(e.size))
                case Product(factors=f):
                    return Product(tuple(map(visit, f)))
                case Sum(terms=t):
                    return Sum(tuple(map(visit, t)))
            raise AssertionError(e)

        return [(visit(a), visit(b)) for a, b in pairs]

    return copy


def froze(pairs: list[tuple[Expr, Expr]]) -> bool:
    """Whether some axes were frozen because their structures don't fit."""
    return any(a.frozen for pair in pairs for e in pair for a in atoms(e))


def coupling(pairs: list[tuple[Expr, Expr]]) -> list[list[int]]:
    """Class of every position of every axis: 0 where frozen, equal where removed together."""
    exprs = [e for pair in pairs for e in pair]
    free = free_atoms(exprs)
    units = [(a, i) for a in free for i in range(a.size)]
    rows = [np.zeros(e.size, dtype=np.int64) for e in exprs]
    for number, (atom, index) in enumerate(units):
        gone = np.ones(atom.size, dtype=bool)
        gone[index] = False
        for row, e in zip(rows, exprs, strict=True):
            row[~mask(e, {atom: gone})] += 1 << (number % 60)
    classes: dict[int, int] = {0: 0}
    return [[classes.setdefault(int(v), len(classes)) for v in row] for row in rows]


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_order_of_unifications_that_fit_does_not_matter(pairs: list[tuple[Expr, Expr]]) -> None:
    make = rebuild(pairs)
    forward, backward = make(), make()
    for a, b in forward:
        unify(a, b, WHY)
    for a, b in reversed(backward):
        unify(a, b, WHY)
    assume(not froze(forward) and not froze(backward))
    assert coupling(forward) == coupling(backward)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_unification_is_idempotent(pairs: list[tuple[Expr, Expr]]) -> None:
    for a, b in pairs:
        unify(a, b, WHY)
    before = coupling(pairs)
    for a, b in pairs:
        unify(b, a, WHY)
    assume(not froze(pairs))
    assert coupling(pairs) == before
