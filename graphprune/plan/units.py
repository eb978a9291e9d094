"""From positions of a dimension to units of a structure.

An axis expression says where in a dimension the units of an atom lie. These maps are what scores
are summed with; they cost one pass over the dimension.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes import Atom, Expr, Product, Select, Sum, normal
from graphprune.axes.expr import IntArray

FloatArray: TypeAlias = npt.NDArray[np.float64]

NONE = -1


def owners(e: Expr, atom: Atom) -> IntArray:
    """The units of `atom` that own each position of `e`.

    A position leaves when any of its owners does. One row is enough unless a product holds the
    atom more than once (``a * a``, a flattened outer product).

    Args:
        e: an axis expression.
        atom: a root atom.

    Returns:
        ``[k, e.size]``: unit numbers, distinct within a column, or -1; no row is all -1.
    """
    rows = _owners(normal(e), atom)
    for i, row in enumerate(rows):  # a unit that owns a position twice owns it once
        for earlier in rows[:i]:
            row[row == earlier] = NONE
    found = [row for row in rows if (row != NONE).any()]
    return np.stack(found) if found else np.zeros((0, e.size), dtype=np.int64)


def unit_index(e: Expr, atom: Atom) -> IntArray:
    """The one unit of `atom` that owns each position of `e`.

    Returns:
        ``[e.size]``: unit numbers, or -1 where the position depends on no unit.

    Raises:
        ValueError: some position has several owners.
    """
    rows = owners(e, atom)
    if (np.count_nonzero(rows != NONE, axis=0) > 1).any():
        raise ValueError(f"positions of {e!r} belong to several units of {atom!r}")
    return np.asarray(rows.max(axis=0, initial=NONE), dtype=np.int64)


def pair_index(e: Expr, outer: Atom, inner: Atom) -> IntArray:
    """Where the positions of `e` lie in the grid of `outer` and `inner` units.

    Returns:
        ``[e.size]``: ``outer unit * inner.size + inner unit``, or -1 where the position does not
        depend on both.
    """
    out, within = unit_index(e, outer), unit_index(e, inner)
    return np.where((out == NONE) | (within == NONE), NONE, out * inner.size + within)


def unit_sums(values: FloatArray, e: Expr, atom: Atom) -> FloatArray:
    """Sum of `values`, one per position of `e`, over the positions of each unit of `atom`.

    Returns:
        ``[atom.size]``.
    """
    if normal(e) is atom:
        return values
    return sum_by(values, owners(e, atom), atom.size)


def pair_sums(values: FloatArray, e: Expr, outer: Atom, inner: Atom) -> FloatArray:
    """Sum of `values`, one per position of `e`, for every outer and inner unit.

    Returns:
        ``[outer.size, inner.size]``.
    """
    index = pair_index(e, outer, inner)
    return sum_by(values, index[None], outer.size * inner.size).reshape(outer.size, inner.size)


def sum_by(values: FloatArray, index: IntArray, size: int) -> FloatArray:
    """Sum of `values` by number, for each row of `index` that numbers them; -1 is left out."""
    total = np.zeros(size)
    for row in index:
        owned = row != NONE
        total += np.bincount(row[owned], weights=values[owned], minlength=size)
    return total


def _owners(e: Expr, atom: Atom) -> list[IntArray]:
    match e:
        case Atom():
            return [np.arange(e.size, dtype=np.int64)] if e is atom else []
        case Product(factors=factors):
            found: list[IntArray] = []
            before = 1
            for factor in factors:
                after = e.size // (before * factor.size)
                for row in _owners(normal(factor), atom):
                    found.append(np.tile(np.repeat(row, after), before))
                before *= factor.size
            return found
        case Sum(terms=terms):
            parts = [_owners(normal(term), atom) for term in terms]
            rows = max(map(len, parts), default=0)
            result = np.full((rows, e.size), NONE, dtype=np.int64)
            start = 0
            for term, part in zip(terms, parts, strict=True):
                for i, row in enumerate(part):
                    result[i, start : start + term.size] = row
                start += term.size
            return list(result)
        case Select(base=base, indices=indices):
            return [row[indices] for row in _owners(normal(base), atom)]
