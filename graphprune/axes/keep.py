"""Kept indices: from a mask per atom to a mask per dimension.

A `Keep` maps root atoms to boolean masks; an atom that it does not name keeps everything. A
`Ragged` entry lets each index of an outer atom keep its own subset of an inner one, with equal
counts (query heads within each key-value group).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.expr import (
    Atom,
    Expr,
    IntArray,
    Product,
    Select,
    Sum,
    atoms,
    normal,
    product,
)

BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """One mask of the inner atom per index of `outer`: ``mask[outer index, inner index]``."""

    outer: Atom
    mask: BoolArray

    def __post_init__(self) -> None:
        counts = self.mask.sum(axis=1)
        if len(self.mask) != self.outer.size or (counts != counts[:1]).any():
            raise ValueError("a ragged mask needs one row per outer index and equal counts")

    @property
    def count(self) -> int:
        """Kept inner indices per outer index."""
        return int(self.mask[0].sum())


Keep: TypeAlias = Mapping[Atom, "BoolArray | Ragged"]


def mask(e: Expr, keep: Keep) -> BoolArray:
    """Which indices of `e` stay.

    Args:
        e: an axis expression.
        keep: masks of its root atoms.

    Returns:
        A boolean array of length ``e.size``.
    """
    return _mask(normal(e), keep, {})


def indices(e: Expr, keep: Keep) -> IntArray:
    """The kept indices of `e`, ascending."""
    return np.flatnonzero(mask(e, keep)).astype(np.int64)


def touched(e: Expr, keep: Keep) -> bool:
    """Whether any atom of `e` has a mask in `keep`."""
    return any(a in keep for a in atoms(e))


def evaluate(e: Expr, size_of: Callable[[Atom], int]) -> int:
    """The size of `e` when each root atom has the size that `size_of` gives.

    Raises:
        ValueError: `e` holds a Select of a shortened axis, whose size depends on which indices go.
    """
    match normal(e):
        case Atom() as a:
            return size_of(a)
        case Product(factors=factors):
            result = 1
            for f in factors:
                result *= evaluate(f, size_of)
            return result
        case Sum(terms=terms):
            return sum(evaluate(t, size_of) for t in terms)
        case Select() as s:
            if s.inverse is not None:
                return evaluate(s.base, size_of)
            if all(size_of(a) == a.size for a in atoms(s.base)):
                return s.size
            raise ValueError(f"the size of {s!r} depends on the kept indices")


def count(e: Expr, keep: Keep) -> int:
    """Number of kept indices of `e`; for ragged atoms the count within one outer index."""
    return counter(keep)(e)


def counter(keep: Keep) -> Callable[[Expr], int]:
    """`count` of many expressions, which looks at the mask of each atom once."""
    counts: dict[Atom, int] = {}

    def size_of(a: Atom) -> int:
        if a not in counts:
            kept = keep.get(a)
            if kept is None:
                counts[a] = a.size
            else:
                counts[a] = kept.count if isinstance(kept, Ragged) else int(kept.sum())
        return counts[a]

    def counted(e: Expr) -> int:
        try:
            return evaluate(e, size_of)
        except ValueError:
            return int(mask(e, keep).sum())

    return counted


def _mask(e: Expr, keep: Keep, at: dict[Atom, int]) -> BoolArray:
    match e:
        case Atom():
            kept = keep.get(e)
            if kept is None:
                return np.ones(e.size, dtype=bool)
            if not isinstance(kept, Ragged):
                return kept
            if kept.outer not in at:
                raise ValueError(f"{e!r} is ragged within {kept.outer!r}, which is not around it")
            row: BoolArray = kept.mask[at[kept.outer]]
            return row
        case Product(factors=()):
            return np.ones(1, dtype=bool)
        case Product(factors=(first, *others)):
            inner = product(others)
            if isinstance(first, Atom) and _ragged_within(inner, first, keep):
                rows = [_mask(inner, keep, {**at, first: i}) for i in range(first.size)]
                return (np.stack(rows) & _mask(first, keep, at)[:, None]).ravel()
            outer = _mask(first, keep, at)[:, None]
            return np.logical_and(outer, _mask(inner, keep, at)[None, :]).ravel()
        case Sum(terms=terms):
            return np.concatenate([_mask(t, keep, at) for t in terms] or [np.ones(0, dtype=bool)])
        case Select(base=base, indices=positions):
            return _mask(base, keep, at)[positions]
    raise AssertionError(e)


def _ragged_within(e: Expr, outer: Atom, keep: Keep) -> bool:
    return any(isinstance(kept := keep.get(a), Ragged) and kept.outer is outer for a in atoms(e))
