"""Where the values of a graph that run along one axis go, and which parameters scale them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphprune.axes import Atom, Expr, atoms
from graphprune.ir.torch.liveness import live_nodes, values_read
from graphprune.ir.torch.program import Program
from graphprune.ops import find_op
from graphprune.streaming.torch.products import bind, operator

_LEFT_RIGHT = {"mm": (0, 1), "matmul": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_ATTENTION = "scaled_dot_product_attention"
_TRAILING = frozenset("layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
_WHOLE = frozenset(("group_norm",))
_PARTS = frozenset(("", "slice", "narrow", "split", "split_with_sizes", "chunk", "select"))
"""Operators whose result is a part of what they read: another part may have the units."""


@dataclass(frozen=True)
class Graph:
    """The graph of a program with what is asked of it again and again."""

    program: Program

    @cached_property
    def live(self) -> set[fx.Node]:
        """The nodes that an output depends on."""
        return live_nodes(self.program.exported.graph)

    @cached_property
    def parameters(self) -> dict[fx.Node, str]:
        """Placeholders to the canonical names of the trainable parameters that they are."""
        nodes = {n.name: n for n in self.program.exported.graph.nodes if n.op == "placeholder"}
        aliases, found = self.program.aliases, {}
        for spec in self.program.exported.graph_signature.input_specs:
            name = aliases.get(str(spec.target), str(spec.target))
            if spec.target is not None and name in self.program.trainable:
                found[nodes[spec.arg.name]] = name
        return found

    @cached_property
    def stored(self) -> set[fx.Node]:
        """The values that depend on nothing that the model is given."""
        specs = self.program.exported.graph_signature.input_specs
        given = {s.arg.name for s in specs if s.target is None}
        found: set[fx.Node] = set()
        for node in self.program.exported.graph.nodes:
            if node.op == "placeholder":
                if node.name not in given:
                    found.add(node)
            elif node.op == "call_function" and found.issuperset(node.all_input_nodes):
                found.add(node)
        return found


@dataclass
class Ends:
    """Where values along an axis are used up.

    Attributes:
        readers: products with a weight that sum over the axis.
        products: products of two activations that sum over it, with the operands.
        noticing: operators, norms for example, whose results depend on which units there are.
        others: everything else that the axis doesn't come out of.
    """

    readers: set[fx.Node] = field(default_factory=set)
    products: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    noticing: set[fx.Node] = field(default_factory=set)
    others: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class Along:
    """The values along one axis; without an atom, values as wholes."""

    graph: Graph
    atom: Atom | None

    def carries(self, node: fx.Node) -> bool:
        """Whether a value runs along the axis."""
        value = node.meta.get("val")
        if self.atom is None:
            return isinstance(value, torch.Tensor) and value.is_floating_point()
        known = self.graph.program.typing.values.get(node.name, ())
        return any(self._lies(d) for dims in known for d in dims)

    def everything(self) -> Iterator[fx.Node]:
        """All values along the axis that are computed from inputs."""
        for node in self.graph.program.exported.graph.nodes:
            if node in self.graph.live and node not in self.graph.stored and self.carries(node):
                yield node

    def ends(self, starts: Iterable[fx.Node]) -> Ends:
        """Where values go, through all that leaves the axis in place."""
        found, waiting = Ends(), list(starts)
        seen = set(waiting)
        while waiting:
            value = waiting.pop()
            for user in value.users:
                if user not in self.graph.live or value not in values_read(user):
                    continue
                if self._note(user, value, found) and user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return found

    def _note(self, user: fx.Node, value: fx.Node, found: Ends) -> bool:
        """Note one use of a value; whether its result runs along the axis because of it."""
        if user.op == "output":
            found.others.add(user)
            return False
        if self.notices(user, value):
            found.noticing.add(user)
            return self.carries(user)
        summed = self._summed(user, value)
        if summed is None:
            goes_on = self.carries(user)
            if not goes_on and _is_data(user) and operator(user) not in _PARTS:
                found.others.add(user)
            return goes_on
        if summed in self.graph.stored:
            found.readers.add(user)
        else:
            found.products.setdefault(user, set()).add(value)
        return False

    def notices(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether an operator's result depends on which units of the axis there are."""
        schema = getattr(user.target, "_schema", None)
        if schema is None or not user.args or user.args[0] is not value:
            return False
        if find_op(schema.name.replace("::", ".")).masked is None:
            return False
        (dims, *_) = self.graph.program.typing.values[value.name]
        name, given, rank = operator(user), bind(user), len(dims)
        along = list(range(rank))
        if name in _TRAILING:
            along = along[rank - len(given["normalized_shape"]) :]
        elif name in _WHOLE:
            along = along[1:]
        elif isinstance(dim := given.get("dim"), int):
            along = [dim % rank]
        elif dim:
            along = [d % rank for d in dim]
        return any(self._lies(dims[d]) for d in along)

    def _summed(self, user: fx.Node, value: fx.Node) -> fx.Node | None:
        """What a value is multiplied with in a product that sums over the axis; None otherwise."""
        name = operator(user)
        if name == "linear" and value is user.args[0] and self._at(value, -1):
            return _node(user.args[1])
        if name.startswith("conv") and value is user.args[0]:
            weight = _node(user.args[1])
            return weight if self._at(weight, 1) else None
        if name == _ATTENTION and value in user.args[:2] and self._at(value, -1):
            return _node(user.args[1] if value is user.args[0] else user.args[0])
        if name in _LEFT_RIGHT:
            left, right = (_node(user.args[i]) for i in _LEFT_RIGHT[name])
            if value is left and self._at(left, -1):
                return right
            if value is right and self._at(right, -2):
                return left
        return None

    def _at(self, node: fx.Node, dim: int) -> bool:
        """Whether a dimension of a value lies along the axis."""
        (dims, *_) = self.graph.program.typing.values[node.name]
        dim = max(dim, -len(dims))
        return self._lies(dims[dim])

    def _lies(self, e: Expr) -> bool:
        """Whether a dimension lies along the axis."""
        return any(atom is self.atom for atom in atoms(e))


def _is_data(node: fx.Node) -> bool:
    """Whether a value is a tensor, or several, and no size."""
    return isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
