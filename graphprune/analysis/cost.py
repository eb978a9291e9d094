"""Cost of a program under any choice of kept counts: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphprune.axes import Atom, Dims, Expr, Keep, atoms, count, evaluate

if TYPE_CHECKING:
    from graphprune.program import BaseProgram, Block


@dataclass(frozen=True, slots=True)
class Cost:
    """Size and work of a model.

    Attributes:
        params: elements of all parameters, tied ones once.
        macs: multiply-accumulates of one forward pass at the example's sizes.
        bytes: bytes of all parameters and persistent buffers, tied ones once.
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

    def __init__(self, program: BaseProgram) -> None:
        """Collect the terms of `program`."""
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
        return _sum(self._without(removed_blocks), counts or {})

    def of(
        self,
        keep: Keep,
        removed_blocks: Collection[Block] = (),
        sizes: Mapping[Atom, int] | None = None,
    ) -> Cost:
        """The cost of a plan: as `total`, but exact where it matters which indices are kept.

        That is so where a model reads only some places of an axis that it has put in another
        order.

        Args:
            keep: kept indices per atom.
            removed_blocks: layers that are cut out.
            sizes: of dynamic axes, where they are to be others than the example's.
        """
        resized = sizes or {}

        def kept(e: Expr) -> int:
            found = [a for a in atoms(e) if a in resized] if resized else []
            scaled = count(e, keep) * math.prod(resized[a] for a in found)
            return scaled // math.prod(a.size for a in found)

        return _weighed((t, [kept(d) for d in t.dims]) for t in self._without(removed_blocks))

    def _without(self, blocks: Collection[Block]) -> Iterator[_Term]:
        gone = self._gone_with(blocks)
        return (t for t in self._terms if t.owner not in gone)

    def unit(self, atom: Atom) -> Cost:
        """What leaves with one index of `atom` while everything else stays."""
        terms = self._by_atom.get(atom, [])
        return _sum(terms, {}) - _sum(terms, {atom: atom.size - 1})

    def block(self, block: Block) -> Cost:
        """What leaves with one layer."""
        owners = (*block.nodes, *block.parameters)
        return _sum((t for o in owners for t in self._by_owner.get(o, [])), {})


def _sum(terms: Iterable[_Term], counts: Mapping[Atom, int]) -> Cost:
    def size_of(a: Atom) -> int:
        return counts.get(a, a.size)

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


def _parameter_terms(program: BaseProgram) -> Iterable[_Term]:
    for one in program.stored():
        dims = program.typing.parameters[one.name]
        values = one.values if one.is_parameter else 0
        yield _Term(one.name, dims, params=values, bits=one.element_bits)


def _contraction_terms(program: BaseProgram) -> Iterable[_Term]:
    for node, dims in program.typing.contractions:
        yield _Term(node, dims, macs=1)
