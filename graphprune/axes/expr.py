"""Axis expressions: the types that graphprune gives to tensor dimensions.

Every dimension of every tensor in a program has an expression built from atoms:

* ``Atom``     indivisible so far, the unit of coupling;
* ``Product``  a row-major merge of factors (``heads * head_dim``);
* ``Sum``      a concatenation of terms (``q + k + v``);
* ``Select``   a constant re-indexing of another axis.

Atoms are the only mutable objects. Unification links an atom to what it turned out to be, as
type variables are linked in Hindley-Milner inference, and `normal` follows the links.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count as _counter
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]

_serial = _counter()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an axis can't be pruned.

    Attributes:
        why: one clause, "indexed by values from outside".
        node: the operator, parameter or input that decided it.
        line: the model's own source line, "file.py:12", or "".
    """

    why: str
    node: str = ""
    line: str = ""

    def __str__(self) -> str:
        place = " at ".join(part for part in (self.node, self.line) if part)
        return f"{self.why} ({place})" if place else self.why


@dataclass(eq=False, slots=True)
class Atom:
    """A dimension, or a part of one, that nothing has divided yet.

    Attributes:
        size: number of indices; for a dynamic dimension its size in the example.
        origin: where it was first seen, for messages.
        link: what unification found it to be; None for a root.
        reason: why it is frozen; None while it may be pruned.
    """

    size: int
    origin: str = ""
    link: Expr | None = None
    reason: Reason | None = None
    serial: int = field(default_factory=lambda: next(_serial))

    @property
    def frozen(self) -> bool:
        """Whether the axis must keep all its indices."""
        return self.reason is not None

    def __repr__(self) -> str:
        mark = "!" if self.frozen else ""
        return f"a{self.serial}{mark}:{self.size}"


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major merge of `factors`; the empty product is the axis of size 1."""

    factors: tuple[Expr, ...]

    @property
    def size(self) -> int:
        """Product of the factors' sizes."""
        return math.prod(f.size for f in self.factors)

    def __repr__(self) -> str:
        return "(" + " * ".join(map(repr, self.factors)) + ")" if self.factors else "1"


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation of `terms`."""

    terms: tuple[Expr, ...]

    @property
    def size(self) -> int:
        """Sum of the terms' sizes."""
        return sum(t.size for t in self.terms)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.terms)) + ")"


@dataclass(frozen=True, slots=True, eq=False)
class Select:
    """`base` re-indexed by a constant: position i holds index ``indices[i]`` of `base`."""

    base: Expr
    indices: IntArray

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self.indices)

    @property
    def inverse(self) -> IntArray | None:
        """The permutation that undoes it, or None where it repeats or leaves out an index."""
        if len(self.indices) != self.base.size:
            return None
        order = np.argsort(self.indices, kind="stable")
        complete = np.array_equal(self.indices[order], np.arange(len(order)))
        return order if complete else None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Select)
            and self.base == other.base
            and np.array_equal(self.indices, other.indices)
        )

    def __hash__(self) -> int:
        return hash((self.base, len(self.indices)))

    def __repr__(self) -> str:
        return f"{self.base!r}[{len(self.indices)} indices]"


Expr: TypeAlias = Atom | Product | Sum | Select
Dims: TypeAlias = tuple[Expr, ...]

UNIT = Product(())


def product(factors: Iterable[Expr]) -> Expr:
    """The merge of `factors` in normal form: flat, without factors of size 1."""
    flat: list[Expr] = []
    for factor in factors:
        e = normal(factor)
        if isinstance(e, Product):
            flat.extend(e.factors)
        elif e.size != 1:
            flat.append(e)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(terms: Iterable[Expr]) -> Expr:
    """The concatenation of `terms` in normal form: flat, without terms of size 0."""
    flat: list[Expr] = []
    for term in terms:
        e = normal(term)
        if isinstance(e, Sum):
            flat.extend(e.terms)
        elif e.size != 0:
            flat.append(e)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def normal(e: Expr) -> Expr:
    """`e` with every link followed and every nesting flattened."""
    match e:
        case Atom():
            if e.link is None:
                return UNIT if e.size == 1 else e
            e.link = normal(e.link)
            return e.link
        case Product():
            if all(isinstance(f, Atom) and f.link is None for f in e.factors):
                return e
            return product(e.factors)
        case Sum():
            if all(isinstance(t, Atom) and t.link is None and t.size > 1 for t in e.terms):
                return e
            return concat(e.terms)
        case Select(base=under, indices=positions):
            base = normal(under)
            if isinstance(base, Select):
                positions = base.indices[positions]
                base = base.base
            if np.array_equal(positions, np.arange(base.size)):
                return base
            return e if base is under else Select(base, positions)


def atoms(e: Expr) -> Iterator[Atom]:
    """The root atoms of `e` from left to right, with repetitions."""
    match normal(e):
        case Atom() as a:
            yield a
        case Product(factors=parts) | Sum(terms=parts):
            for part in parts:
                yield from atoms(part)
        case Select(base=base):
            yield from atoms(base)


def enclosed(dims: Dims) -> Iterator[tuple[Atom, frozenset[Atom]]]:
    """Every root atom in a tensor's axes, with the atoms that are outer factors around it.

    The factors of a dimension are around all later dimensions too.
    """
    outside: frozenset[Atom] = frozenset()
    for d in dims:
        e = normal(d)
        yield from _enclosed(e, outside)
        factors = e.factors if isinstance(e, Product) else (e,)
        outside |= {f for f in factors if isinstance(f, Atom)}


def _enclosed(e: Expr, outside: frozenset[Atom]) -> Iterator[tuple[Atom, frozenset[Atom]]]:
    match normal(e):
        case Atom() as a:
            yield a, outside
        case Product(factors=factors):
            for f in factors:
                yield from _enclosed(f, outside)
                if isinstance(f, Atom):
                    outside |= {f}
        case Sum(terms=terms):
            for t in terms:
                yield from _enclosed(t, outside)
        case other:
            for a in atoms(other):
                yield a, frozenset()


def path_to(e: Expr, atom: Atom) -> tuple[int, ...] | None:
    """Positions that lead from `e` to the first occurrence of the root `atom`, or None."""
    match normal(e):
        case Atom() as a:
            return () if a is atom else None
        case Product(factors=parts) | Sum(terms=parts):
            for position, part in enumerate(parts):
                found = path_to(part, atom)
                if found is not None:
                    return (position, *found)
        case Select(base=base):
            return path_to(base, atom)
    return None
