"""Where the gate of a unit multiplies: once on every path from the unit to what the model returns.

A gate is laid on weights, so that it can be folded into them afterwards: on the columns of what
reads an axis; on the weight and bias of the norm between, where there is one; on the rows of one of
two producers, where both meet in a product (queries and keys); on the last linear map of each
branch, where layers go, and of each expert. What notices how many units there are, as norms and
routers do, has to leave out those whose gate is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from graphprune.analysis.structure import Block, Structure
from graphprune.axes.expr import IntArray
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.plan.units import NONE
from graphprune.streaming import find_sites
from graphprune.streaming.consumers import input_positions, owning_units
from graphprune.streaming.core.sites import Sites
from graphprune.streaming.torch.products import operator
from graphprune.training.gates.flow import Along, Ends, Graph
from graphprune.training.gates.picked import picked_last
from graphprune.training.gates.scales import Scale, scales

_PASSED = frozenset("to _to_copy alias clone contiguous dropout".split())


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter that gates of one structure multiply.

    Attributes:
        structure: its name.
        parameter: canonical name.
        dim: the dimension along which they lie; None for the whole parameter.
        units: the unit of each position of it, ``outer unit * size + unit`` where the structure is
            ragged, -1 for none; the one unit of a whole parameter.
        offset: what the model adds to the parameter before it multiplies by it.
    """

    structure: str
    parameter: str
    dim: int | None
    units: IntArray | int
    offset: float = 0.0


@dataclass(frozen=True)
class Places:
    """Where the gates of some structures multiply.

    Attributes:
        places: the parameters.
        noticing: operators that have to leave closed units out, by the names of their values, to
            the structures whose units they notice.
    """

    places: tuple[Place, ...]
    noticing: Mapping[str, tuple[Structure, ...]] = field(default_factory=dict)

    @cached_property
    def by_parameter(self) -> dict[str, list[Place]]:
        """The places on each parameter."""
        found: dict[str, list[Place]] = {}
        for place in self.places:
            found.setdefault(place.parameter, []).append(place)
        return found


def places_of(program: Program, structures: Iterable[Structure]) -> Places:
    """Find where gates multiply.

    Args:
        program: the program.
        structures: prunable ones.

    Raises:
        PlanError: one of them offers no place for gates; the message says why.
    """
    finder = _Finder(program, Graph(program), find_sites(program, every=True))
    found: list[Place] = []
    noticing: dict[str, list[Structure]] = {}
    for structure in structures:
        if structure.blocks:
            found += finder.of_blocks(structure)
            continue
        places, ends = finder.of_axis(structure)
        found += places
        for node in ends.noticing:
            noticing.setdefault(node.name, []).append(structure)
    return Places(tuple(found), {name: tuple(own) for name, own in noticing.items()})


@dataclass(frozen=True)
class _Finder:
    program: Program
    graph: Graph
    sites: Sites

    def of_axis(self, structure: Structure) -> tuple[list[Place], Ends]:
        """The places of a structure with an axis, and where its values end."""
        along = Along(self.graph, structure.atom)
        ends = along.ends(along.everything())
        if ends.others:
            first = min(ends.others, key=lambda n: n.name)
            raise _nowhere(structure, f"{_told(first)} reads its units, which no weight does")
        if not ends.readers and not ends.products:
            if picked := self._picked(structure, ends):
                return picked, ends
            raise _nowhere(structure, "nothing multiplies by what runs along it")
        norms = self._norms(along, ends) if ends.noticing else {}
        found: list[Scale] = [s for own in norms.values() for s in own]
        columns: dict[str, list[Place]] = {}
        for reader in sorted(ends.readers - norms.keys(), key=lambda n: n.name):
            site = self.sites.all.get(reader.name)
            parameter = reader.name if site is None else site.parameter
            if parameter not in columns:
                columns[parameter] = self._columns(structure, reader, norms.keys())
        for product, operands in ends.products.items():
            found += self._side(structure, along, product, operands)
        places = {(s.parameter, s.dim): self._placed(structure, s) for s in found}
        return [*places.values(), *(p for own in columns.values() for p in own)], ends

    def _picked(self, structure: Structure, ends: Ends) -> list[Place]:
        """The places of units that are picked by index, where something notices which there are."""
        if not ends.noticing:
            return []
        router = min(ends.noticing, key=lambda n: n.name)
        found = picked_last(self.graph, structure)
        return [self._placed(structure, Scale(name, dim, 0.0, router)) for name, dim in found]

    def _norms(self, along: Along, ends: Ends) -> dict[fx.Node, list[Scale]]:
        """Readers that read the result of a norm, to its parameters, if nothing else reads it."""
        found = {}
        for reader in ends.readers:
            scaled = [n for n in reader.all_input_nodes if n not in self.graph.stored]
            own = scales(along, scaled[0], vectors=True) if len(scaled) == 1 else None
            if own is not None:
                found[reader] = own
        while True:
            wrong = {r for r, own in found.items() if not self._only_read(along, own, found.keys())}
            if not wrong:
                return found
            for reader in wrong:
                del found[reader]

    def _only_read(self, along: Along, own: Sequence[Scale], readers: Iterable[fx.Node]) -> bool:
        reached = along.ends({s.at for s in own})
        return (
            not reached.noticing
            and not reached.others
            and not reached.products
            and reached.readers <= set(readers)
            and self._used_there(own)
        )

    def _used_there(self, own: Sequence[Scale]) -> bool:
        """Whether the model uses parameters nowhere but where they scale."""
        for scale in own:
            nodes = [n for n, name in self.graph.parameters.items() if name == scale.parameter]
            starts = [u for n in nodes for u in self._applied(n)]
            if len({operator(u) for u in starts}) > 1:
                return False
        return True

    def _applied(self, node: fx.Node) -> list[fx.Node]:
        """The operators that use a parameter together with a value."""
        users = [u for u in node.users if u in self.graph.live]
        inside = [u for u in users if u in self.graph.stored]
        return [u for u in users if u not in self.graph.stored] + [
            v for u in inside for v in self._applied(u)
        ]

    def _columns(
        self, structure: Structure, reader: fx.Node, gated: Iterable[fx.Node]
    ) -> list[Place]:
        """The columns of a weight that reads an axis."""
        site = self.sites.all.get(reader.name)
        if site is None:
            raise _nowhere(
                structure,
                f"the weight that {_told(reader)} multiplies by is used in another way too",
            )
        twins = {n.name for n in gated} & {
            s.node for s in self.sites.all.values() if s.parameter == site.parameter
        }
        if twins:
            raise _nowhere(structure, f"{site.parameter} reads it behind a norm and without one")
        name, found = site.parameter, []
        for member, dim in structure.members:
            if self.program.aliases.get(member, member) != name:
                continue
            shape = self.program.parameters[name]
            if input_positions(site.layout, shape, dim) is not None:
                found.append(self._placed(structure, Scale(name, dim, 0.0, reader)))
        if not found:
            raise _nowhere(structure, f"{name} has no columns of its own for the units")
        return found

    def _side(
        self, structure: Structure, along: Along, product: fx.Node, operands: set[fx.Node]
    ) -> list[Scale]:
        """The parameters behind the smaller of two values that meet in a product."""
        choices = []
        for operand in operands:
            own = scales(along, operand)
            if own is None:
                continue
            reached = along.ends({s.at for s in own})
            alone = reached.products.keys() <= {product} and not reached.readers
            if alone and not reached.noticing and not reached.others:
                size = sum(self._elements(s.parameter) for s in own)
                choices.append((size, operand.name, own))
        if not choices:
            raise _nowhere(
                structure, f"neither side of {_told(product)} is proportional to weights alone"
            )
        return min(choices, key=lambda c: c[:2])[2]

    def of_blocks(self, structure: Structure) -> list[Place]:
        """The places of layers, or of their branches."""
        along = Along(self.graph, None)
        nodes = {n.name: n for n in self.program.exported.graph.nodes}
        found = []
        for block in structure.blocks:
            branches = _trunk(nodes[block.exit], nodes[block.entry], set(block.nodes))
            if not branches:
                raise _nowhere(structure, f"unit {block.index} adds nothing to a residual stream")
            for branch in branches:
                found += self._of_branch(structure, along, block, branch)
        return found

    def _of_branch(
        self, structure: Structure, along: Along, block: Block, branch: fx.Node
    ) -> list[Place]:
        own = scales(along, branch)
        if own is None:
            raise _nowhere(
                structure,
                f"the branch of unit {block.index} that ends in {_told(branch)} is proportional "
                "to no weight",
            )
        shared = [s.parameter for s in own if s.parameter not in block.parameters]
        if shared:
            raise _nowhere(structure, f"{shared[0]} is shared with other layers")
        names = dict.fromkeys((s.parameter, s.offset) for s in own)
        return [Place(structure.name, n, None, block.index, offset) for n, offset in names]

    def _placed(self, structure: Structure, scale: Scale) -> Place:
        assert scale.dim is not None
        units = owning_units(self.program.axis(scale.parameter, scale.dim), structure)
        if units is None:
            raise _nowhere(structure, f"positions of {scale.parameter} belong to several units")
        if (units == NONE).all():
            raise _nowhere(structure, f"{scale.parameter} doesn't have the axis around it")
        return Place(structure.name, scale.parameter, scale.dim, units, scale.offset)

    def _elements(self, name: str) -> int:
        size = 1
        for n in self.program.parameters[name]:
            size *= n
        return size


def _trunk(node: fx.Node, entry: fx.Node, inside: set[str]) -> list[fx.Node] | None:
    """The branches that are added on the way from a layer's entry to a value.

    None if there is more on the way than additions.
    """
    if node is entry:
        return []
    if node.name not in inside:
        return None
    name = operator(node)
    if name in _PASSED and isinstance(node.args[0], fx.Node):
        return _trunk(node.args[0], entry, inside)
    if name not in ("add", "add_"):
        return None
    pair = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    if len(pair) != 2:
        return None
    ways = [_trunk(n, entry, inside) for n in pair]
    if (ways[0] is None) == (ways[1] is None):
        return None
    through = 0 if ways[0] is not None else 1
    found = ways[through]
    assert found is not None
    return [*found, pair[1 - through]]


def _told(node: fx.Node) -> str:
    """An operator in words."""
    return f"{operator(node) or node.op} ({node.name})"


def _nowhere(structure: Structure, why: str) -> PlanError:
    return PlanError(
        f"{structure.role or 'a structure'} offers no place for gates",
        where=structure.name,
        why=why,
        hint="leave the role out, or choose its units by a score (select)",
    )
