"""Cost of a program under any choice of kept counts: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphprune.axes import (
    Atom,
    Dims,
    Expr,
    Keep,
    Product,
    Select,
    Sum,
    atoms,
    count,
    evaluate,
    normal,
)

if TYPE_CHECKING:
    from graphprune.analysis.facts import GraphFacts
    from graphprune.analysis.structure import Block


@dataclass(frozen=True, slots=True)
class Cost:
    """Size and work of a model.

    Attributes:
        params: elements of all parameters, tied ones once.
        macs: multiply-accumulates of one call; see `graphprune.analysis.workload` for its input.
        bytes: bytes of all parameters and persistent buffers, tied ones once, in the types that
            they are stored in. A file has some more: names, shapes, and what else its format says.
    """

    params: int
    macs: int
    bytes: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.bytes - other.bytes)


@dataclass(frozen=True, slots=True)
class _Term:
    """A product of axes that is summed into the cost; `owner` is a parameter or a graph value.

    What follows is per element.
    """

    owner: str
    dims: Dims
    params: int = 0
    macs: int = 0
    bits: int = 0


class CostModel:
    """Evaluates costs from kept counts, without touching a weight."""

    def __init__(self, program: GraphFacts, sizes: Mapping[Atom, int] | None = None) -> None:
        """Collect the terms of `program`.

        Args:
            program: the program.
            sizes: of the axes that have others in the call than in the program's example.
        """
        self._sizes = dict(sizes or {})
        self._gone_with = program.gone_with
        self._terms = [*_parameter_terms(program), *_contraction_terms(program)]
        self._by_atom: dict[Atom, list[_Term]] = defaultdict(list)
        self._by_owner: dict[str, list[_Term]] = defaultdict(list)
        for term in self._terms:
            self._by_owner[term.owner].append(term)
            for atom in {a for d in term.dims for a in atoms(d)}:
                self._by_atom[atom].append(term)

    def total(
        self,
        counts: Mapping[Atom, int] | None = None,
        removed_blocks: Collection[Block] = (),
    ) -> Cost:
        """The cost when each atom in `counts` keeps that many indices and some layers go.

        Args:
            counts: kept indices per atom; an atom that is not named keeps all.
            removed_blocks: layers that are cut out.
        """
        return self._sum(self._without(removed_blocks), counts or {})

    def of(self, keep: Keep, removed_blocks: Collection[Block] = ()) -> Cost:
        """The cost of a plan: as `total`, but exact where it matters which indices are kept.

        That is so where a model reads only some places of an axis that it has put in another
        order.

        Args:
            keep: kept indices per atom.
            removed_blocks: layers that are cut out.
        """
        sizes = self._sizes

        def kept(e: Expr) -> int:
            if sizes.keys().isdisjoint(atoms(e)):
                return count(e, keep)
            match normal(e):
                case Atom() as atom:
                    return sizes[atom]
                case Product(factors=parts):
                    return math.prod(map(kept, parts))
                case Sum(terms=parts):
                    return sum(map(kept, parts))
                case Select(base=base) as chosen:
                    return count(chosen, keep) * kept(base) // count(base, keep)

        return _weighed((t, [kept(d) for d in t.dims]) for t in self._without(removed_blocks))

    def expected(
        self, size_of: Mapping[Atom, Any], stays: Mapping[str, Any], resource: str
    ) -> tuple[Any, int]:
        """The cost where sizes are expectations: numbers, or whatever adds and multiplies as they.

        Args:
            size_of: expected kept indices per atom; an atom that is not named keeps all.
            stays: parameter or graph value to the chance that it isn't cut out, if it may be.
            resource: "params", "macs" or "bytes".

        Returns:
            What depends on them, and the rest.
        """
        moving: Any = 0
        fixed = 0

        def size(a: Atom) -> Any:
            return size_of[a] if a in size_of else self._sizes.get(a, a.size)

        for term in self._terms:
            weight = term.bits / 8 if resource == "bytes" else getattr(term, resource)
            touched = term.owner in stays or any(a in size_of for d in term.dims for a in atoms(d))
            if not weight:
                continue
            product = math.prod((_size(d, size) for d in term.dims), start=weight)
            if touched:
                moving = moving + product * stays.get(term.owner, 1)
            else:
                fixed += round(product)
        return moving, fixed

    def _without(self, blocks: Collection[Block]) -> Iterator[_Term]:
        gone = self._gone_with(blocks)
        return (t for t in self._terms if t.owner not in gone)

    def unit(self, atom: Atom) -> Cost:
        """What leaves with one index of `atom` while everything else stays."""
        terms = self._by_atom.get(atom, [])
        return self._sum(terms, {}) - self._sum(terms, {atom: atom.size - 1})

    def block(self, block: Block) -> Cost:
        """What leaves with one layer."""
        owners = (*block.nodes, *block.parameters)
        return self._sum((t for o in owners for t in self._by_owner.get(o, [])), {})

    def _sum(self, terms: Iterable[_Term], counts: Mapping[Atom, int]) -> Cost:
        sizes = {**self._sizes, **counts}

        def size_of(a: Atom) -> int:
            return sizes.get(a, a.size)

        return _weighed((term, [_size(d, size_of) for d in term.dims]) for term in terms)


def _weighed(terms: Iterable[tuple[_Term, list[int]]]) -> Cost:
    """The sum of terms of given sizes."""
    params = macs = size = 0
    for term, sizes in terms:
        n = math.prod(sizes)
        params += n * term.params
        macs += n * term.macs
        size += -(-n * term.bits // 8)
    return Cost(params, macs, size)


def _size(e: Expr, size_of: Callable[[Atom], int]) -> int:
    try:
        return evaluate(e, size_of)
    except ValueError:  # a choice of indices of a shortened axis: in proportion
        found = list(atoms(e))
        whole = math.prod(a.size for a in found)
        return e.size * math.prod(map(size_of, found)) // whole


def _parameter_terms(program: GraphFacts) -> Iterable[_Term]:
    for one in program.stored():
        dims = program.typing.parameters[one.name]
        values = one.values if one.is_parameter else 0
        yield _Term(one.name, dims, params=values, bits=one.element_bits)


def _contraction_terms(program: GraphFacts) -> Iterable[_Term]:
    for node, dims in program.typing.contractions:
        yield _Term(node, dims, macs=1)
