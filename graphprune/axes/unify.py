"""Unification of axis expressions: two axes that must keep the same indices become one.

The rules keep one invariant: after ``unify(a, b)`` the keep masks of `a` and `b` are equal under
every choice of kept indices. Where the two shapes don't fit together, both are frozen, which is
always sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphprune.axes.expr import (
    UNIT,
    Atom,
    Expr,
    Product,
    Reason,
    Select,
    Sum,
    atoms,
    concat,
    normal,
    product,
)


def freeze(e: Expr, reason: Reason) -> None:
    """Forbid the removal of any index of `e`; the first reason given to an atom stays."""
    for atom in atoms(e):
        if atom.reason is None:
            atom.reason = reason


def unify(a: Expr, b: Expr, reason: Reason) -> None:
    """Make `a` and `b` the same axis.

    Args:
        a: an axis.
        b: an axis of the same size.
        reason: what is recorded on both where their structures don't fit.

    Raises:
        ValueError: the sizes differ (a fault of the operator rule that calls).
    """
    a, b = normal(a), normal(b)
    if a == b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of different size: {a!r} and {b!r}")
    match a, b:
        case Atom(), Atom():
            old, young = (a, b) if a.serial < b.serial else (b, a)
            _bind(young, old, reason)
        case Atom(), _:
            _bind(a, b, reason)
        case _, Atom():
            _bind(b, a, reason)
        case Product(), Product():
            _products(list(a.factors), list(b.factors), reason)
        case Sum(), Sum():
            _sums(list(a.terms), list(b.terms), reason)
        case Product(), Sum():
            _product_with_sum(a, b, reason)
        case Sum(), Product():
            _product_with_sum(b, a, reason)
        case Select(), Select() if np.array_equal(a.indices, b.indices) and (
            a.base.size == b.base.size
        ):
            unify(a.base, b.base, reason)
        case _:
            if not (_undo(a, b, reason) or _undo(b, a, reason)):
                _give_up((a, b), reason)


def split_at(e: Expr, position: int) -> tuple[Expr, Expr] | None:
    """`e` as a concatenation cut at `position`, splitting atoms where needed.

    Args:
        e: an axis.
        position: 0 to ``e.size``.

    Returns:
        The two parts, or None where the cut goes through a factor that has no boundary there.
    """
    e = normal(e)
    if position == 0:
        return Sum(()), e
    if position == e.size:
        return e, Sum(())
    match e:
        case Atom():
            parts = tuple(
                Atom(size, e.origin, reason=e.reason) for size in (position, e.size - position)
            )
            e.link = Sum(parts)
            return normal(parts[0]), normal(parts[1])
        case Sum():
            left: list[Expr] = []
            terms = list(e.terms)
            while terms and position >= terms[0].size:
                left.append(terms.pop(0))
                position -= left[-1].size
            if not position:
                return concat(left), concat(terms)
            cut = split_at(terms[0], position)
            if cut is None:
                return None
            return concat([*left, cut[0]]), concat([cut[1], *terms[1:]])
        case Product():
            rest = product(e.factors[1:])
            if position % rest.size:
                return _split_inside(e.factors[0], rest, position)
            cut = split_at(e.factors[0], position // rest.size)
            if cut is None:
                return None
            rest = normal(rest)
            return product([cut[0], rest]), product([cut[1], rest])
        case Select():
            return Select(e.base, e.indices[:position]), Select(e.base, e.indices[position:])


def _split_inside(outer: Expr, rest: Expr, position: int) -> tuple[Expr, Expr] | None:
    """``outer * rest`` cut at a place inside one of the blocks of `rest`.

    That block stays, as a term of its own, and all blocks are divided where it is. A cut with no
    common divisor would crumble them into single indices, so it isn't made.
    """
    before, inside = divmod(position, rest.size)
    if math.gcd(inside, rest.size) == 1:
        return None
    head = split_at(outer, before)
    tail = split_at(head[1], 1) if head else None
    block = split_at(rest, inside) if tail else None
    if head is None or tail is None or block is None:
        return None
    rest = normal(rest)
    return concat([product([head[0], rest]), block[0]]), concat(
        [block[1], product([tail[1], rest])]
    )


def _bind(atom: Atom, e: Expr, reason: Reason) -> None:
    if any(a is atom for a in atoms(e)):  # a = a[permutation]: only an unpruned axis satisfies it
        _give_up((atom, e), reason)
        return
    if atom.reason is not None:
        freeze(e, atom.reason)
    atom.link = e


def _undo(a: Expr, b: Expr, reason: Reason) -> bool:
    """Bind the atom of a permutation `a` to what it has to be for `a` to equal `b`."""
    if not isinstance(a, Select) or not isinstance(a.base, Atom):
        return False
    inverse = a.inverse
    if inverse is None:
        return False
    _bind(a.base, normal(Select(b, inverse)), reason)
    return True


def _give_up(exprs: Sequence[Expr], reason: Reason) -> None:
    for e in exprs:
        freeze(e, reason)


def _products(left: list[Expr], right: list[Expr], reason: Reason) -> None:
    """Align two lists of factors from the left, splitting the larger where sizes differ."""
    while left and right:
        f, g = normal(left.pop(0)), normal(right.pop(0))
        if isinstance(f, Product):  # an earlier step divided it, or it was a unit
            left, right = [*f.factors, *left], [g, *right]
            continue
        if isinstance(g, Product):
            left, right = [f, *left], [*g.factors, *right]
            continue
        if f.size == g.size:
            unify(f, g, reason)
            continue
        common = math.gcd(f.size, g.size)
        front_f = _split_front(f, common) if common > 1 else None
        front_g = _split_front(g, common) if front_f else None
        if front_f is None or front_g is None:
            left, right = _skip_factors([f, *left], [g, *right], reason)
            continue
        unify(front_f[0], front_g[0], reason)
        left, right = [front_f[1], *left], [front_g[1], *right]


def _skip_factors(
    left: list[Expr], right: list[Expr], reason: Reason
) -> tuple[list[Expr], list[Expr]]:
    """Freeze the first factors of both lists up to where their products agree; returns the rest."""
    ahead, behind = (left, 1), (right, 1)
    while ahead[1] != behind[1] or ahead[1] == 1:
        if ahead[1] > behind[1]:
            ahead, behind = behind, ahead
        factors, size = ahead
        freeze(factors[0], reason)
        ahead = (factors[1:], size * factors[0].size)
    return (ahead[0], behind[0])


def _split_front(e: Expr, front: int) -> tuple[Expr, Expr] | None:
    """`e` as ``front * rest``; a concatenation is taken as `front` equal segments."""
    if front == e.size:
        return e, UNIT
    e = normal(e)
    match e:
        case Atom():
            outer = Atom(front, e.origin, reason=e.reason)
            inner = Atom(e.size // front, e.origin, reason=e.reason)
            e.link = Product((outer, inner))
            return outer, normal(inner)
        case Sum() if front > 1:
            segment = Atom(e.size // front)
            counted = Sum((UNIT,) * front)
            _product_with_sum(Product((counted, segment)), e, Reason("segments that don't align"))
            return counted, normal(segment)
    return None


def _sums(left: list[Expr], right: list[Expr], reason: Reason) -> None:
    """Align two lists of terms from the left, cutting the longer where sizes differ."""
    while left and right:
        s, t = normal(left.pop(0)), normal(right.pop(0))
        if isinstance(s, Sum):
            left, right = [*s.terms, *left], [t, *right]
            continue
        if isinstance(t, Sum):
            left, right = [s, *left], [*t.terms, *right]
            continue
        if s.size == t.size:
            unify(s, t, reason)
            continue
        size = min(s.size, t.size)
        cut_s, cut_t = split_at(s, size), split_at(t, size)
        if cut_s is None or cut_t is None:
            left, right = _skip([s, *left], [t, *right], reason)
            continue
        unify(cut_s[0], cut_t[0], reason)
        left, right = [cut_s[1], *left], [cut_t[1], *right]


def _skip(left: list[Expr], right: list[Expr], reason: Reason) -> tuple[list[Expr], list[Expr]]:
    """Freeze the first terms of both lists up to the nearest boundary that both can have."""
    ahead, behind = (left, 0), (right, 0)  # (terms, frozen positions so far)
    while ahead[1] != behind[1] or not ahead[1]:
        (terms, done), (_, limit) = behind, ahead
        term = terms[0]
        cut = split_at(term, limit - done) if limit - done < term.size and limit else None
        part, rest = (cut[0], [cut[1]]) if cut else (term, [])
        freeze(part, reason)
        behind = ([*rest, *terms[1:]], done + part.size)
        if behind[1] > ahead[1]:
            ahead, behind = behind, ahead
    return (ahead[0], behind[0])


def _product_with_sum(p: Product, s: Sum, reason: Reason) -> None:
    """Divide the outer factor of `p` at the boundaries that it shares with the terms of `s`.

    A run of terms without such a boundary inside it is a stack of equal segments (the gates of
    an LSTM, q, k and v in one weight): there the outer factor can't be pruned and all segments
    are the same axis.
    """
    outer, rest = p.factors[0], product(p.factors[1:])
    runs: list[list[Expr]] = []
    run: list[Expr] = []
    for term in s.terms:
        run.append(term)
        if sum(t.size for t in run) % rest.size == 0:
            runs.append(run)
            run = []
    if run:  # can't happen: the sizes of p and s agree
        raise ValueError(f"axes of different size: {p!r} and {s!r}")
    for run in runs:
        size = sum(t.size for t in run) // rest.size
        cut = split_at(outer, size)
        if cut is None:
            _give_up((p, s), reason)
            return
        head, outer = cut
        if len(run) == 1:
            unify(product([head, rest]), run[0], reason)
        elif not _segments(head, rest, concat(run), reason):
            _give_up((p, s), reason)
            return


def _segments(outer: Expr, inner: Expr, run: Expr, reason: Reason) -> bool:
    """Freeze `outer` and unify every one of its segments of `run` with `inner`."""
    freeze(outer, Reason("it counts equal segments of a concatenation", reason.node, reason.line))
    remaining = run
    for _ in range(outer.size):
        cut = split_at(remaining, inner.size)
        if cut is None:
            return False
        unify(cut[0], inner, reason)
        remaining = normal(cut[1])
    return True
