"""Parameters that a value is proportional to: scaled by a number, they scale the value by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from graphprune.axes import atoms
from graphprune.ir.torch.liveness import values_read
from graphprune.streaming.torch.products import bind, operator, rank
from graphprune.training.gates.flow import Along

_SAME = frozenset(
    "to _to_copy alias detach clone contiguous dropout view reshape _unsafe_view flatten unflatten "
    "unsqueeze squeeze transpose permute t mT numpy_T expand repeat repeat_interleave slice select "
    "neg relu leaky_relu split chunk split_with_sizes unbind index index_select cat stack roll "
    "mean sum movedim swapaxes narrow tile flip type_as expand_as view_as".split()
)
"""Operators whose result is twice as large if all that they read is, and positive numbers scale."""

_SHAPED = frozenset(
    "to _to_copy alias detach clone contiguous view reshape _unsafe_view unsqueeze squeeze "
    "transpose permute t mT numpy_T expand type_as".split()
)
_NORMS = frozenset("layer_norm native_layer_norm rms_norm _fused_rms_norm batch_norm".split())
_PRODUCTS = frozenset("mm matmul bmm addmm baddbmm".split())
_DEEP = 60


@dataclass(frozen=True)
class Scale:
    """A parameter that a value is proportional to.

    Attributes:
        parameter: its canonical name.
        dim: the dimension that lies along the axis; None for the parameter as a whole.
        offset: what the graph adds to the parameter before it multiplies by it.
        at: the operator that reads it.
    """

    parameter: str
    dim: int | None
    offset: float
    at: fx.Node


def scales(along: Along, node: fx.Node, *, vectors: bool = False) -> list[Scale] | None:
    """The parameters that a value along an axis is proportional to together.

    Args:
        along: the axis.
        node: the value.
        vectors: whether only vectors will do, such as the weight and bias of a norm.

    Returns:
        None where there are none, or none that are understood.
    """
    return _Walk(along, vectors).of(node, 0)


@dataclass(frozen=True)
class _Walk:
    along: Along
    vectors: bool

    def of(self, node: fx.Node, depth: int) -> list[Scale] | None:
        """See `scales`."""
        if depth > _DEEP or node.op != "call_function" or not self.along.carries(node):
            return None
        name = operator(node)
        given = [n for n in values_read(node) if n.meta.get("val") is not None]
        if name in _SAME or not name:  # what takes one of several results has no name
            return self._all([n for n in given if self._counts(n)], node, depth)
        if name in ("add", "sub", "add_", "sub_"):
            both = node.args[:2]
            if not all(isinstance(n, fx.Node) and self._counts(n) for n in both):
                return None
            return self._all([n for n in both if isinstance(n, fx.Node)], node, depth)
        if name in ("mul", "mul_"):
            return self._any([n for n in given if self._counts(n)], node, depth)
        if name in ("div", "div_"):
            return self._all([n for n in given[:1] if n is node.args[0]], node, depth)
        if name in _NORMS:
            named = bind(node)
            weight, bias = named["weight"], named.get("bias")
            if not isinstance(weight, fx.Node):
                return None
            return self._all([n for n in (weight, bias) if isinstance(n, fx.Node)], node, depth)
        if name == "linear" or name.startswith("conv"):
            pair = [n for n in node.args[1:3] if isinstance(n, fx.Node)]
            return self._all(pair, node, depth)
        if name == "scaled_dot_product_attention":
            return self._all([n for n in node.args[2:3] if isinstance(n, fx.Node)], node, depth)
        if name in _PRODUCTS:
            return self._product(node, depth)
        return None

    def _product(self, node: fx.Node, depth: int) -> list[Scale] | None:
        added = [n for n in node.args[:-2] if isinstance(n, fx.Node)]
        pair = [n for n in node.args[-2:] if isinstance(n, fx.Node) and self._counts(n)]
        one = self._any(pair, node, depth)
        beside = self._all(added, node, depth) if added else []
        return None if one is None or beside is None else [*one, *beside]

    def _counts(self, node: fx.Node) -> bool:
        return self.along.carries(node)

    def _one(self, node: fx.Node, at: fx.Node, depth: int) -> list[Scale] | None:
        if node in self.along.graph.stored:
            found = self._parameter(node, at)
            return None if found is None else [found]
        return self.of(node, depth + 1)

    def _all(self, nodes: Iterable[fx.Node], at: fx.Node, depth: int) -> list[Scale] | None:
        found: list[Scale] = []
        for node in nodes:
            own = self._one(node, at, depth)
            if own is None:
                return None
            found += own
        return found or None

    def _any(self, nodes: Iterable[fx.Node], at: fx.Node, depth: int) -> list[Scale] | None:
        """The scales of one factor: a parameter before a value."""
        stored = self.along.graph.stored
        for node in sorted(nodes, key=lambda n: n not in stored):
            found = self._one(node, at, depth)
            if found is not None:
                return found
        return None

    def _parameter(self, node: fx.Node, at: fx.Node) -> Scale | None:
        """The parameter behind a value that nothing given changes."""
        offset, graph = 0.0, self.along.graph
        while node not in graph.parameters:
            name = operator(node)
            if name == "add" and not offset and isinstance(node.args[1], int | float):
                offset = float(node.args[1])
            elif name not in _SHAPED:
                return None
            before = node.args[0]
            if not isinstance(before, fx.Node):
                return None
            node = before
        parameter = graph.parameters[node]
        if self.vectors and rank(node) != 1:
            return None
        if self.along.atom is None:
            return Scale(parameter, None, offset, at)
        dims = graph.program.typing.parameters[parameter]
        found = [d for d, e in enumerate(dims) if self.along.atom in atoms(e)]
        return Scale(parameter, found[0], offset, at) if len(found) == 1 else None
