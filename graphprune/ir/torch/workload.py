"""The sizes of a call of an exported graph, and of all its values then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.analysis.signature import Input
from graphprune.analysis.workload import Workload
from graphprune.ir.torch.interpreter import flat_inputs, input_names
from graphprune.ir.torch.sizes import ExampleSizes

_ALWAYS = 2  # torch.export takes it that an open size is at least this, and runs with one as well

Example = tuple[tuple[Any, ...], dict[str, Any]]


class OpenSizes:
    """Sizes that a graph leaves open, and what they are in a call."""

    def __init__(
        self, exported: ExportedProgram, inputs: Sequence[Input], length: int | None
    ) -> None:
        """Settle on a size for every symbol that a batch or a number of tokens determines.

        Args:
            exported: a graph.
            inputs: its tensors.
            length: tokens; None leaves their number as it was traced.
        """
        self.exported = exported
        self.inputs = inputs
        self.length = length
        self.example = ExampleSizes(exported)
        self.values: dict[Any, int] = {}
        self.dims = {
            n.name: tuple(n.meta["val"].shape)
            for n in exported.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
        }
        for one in inputs:
            for dim, size in enumerate(self.dims[one.name]):
                self._settle(one, dim, size)

    def workload(self) -> Workload:
        """One sample, if the graph takes it, else what it was traced with."""
        shapes = {
            i.name: tuple(self._size(size) for size in self.dims[i.name]) for i in self.inputs
        }
        found = Workload(shapes, bool(self.inputs) and all(i.is_tokens for i in self.inputs))
        return found if _is_taken(self.exported, found) else self.traced()

    def traced(self) -> Workload:
        """The sizes of the example."""
        shapes = {
            i.name: tuple(self.example.size(size).size for size in self.dims[i.name])
            for i in self.inputs
        }
        return Workload(shapes, bool(self.inputs) and all(i.is_tokens for i in self.inputs))

    def _settle(self, one: Input, dim: int, size: Any) -> None:
        """Decide on the symbol of a dimension, once."""
        expr = None if isinstance(size, int) else size.node.expr
        if expr is None or len(expr.free_symbols) != 1:
            return
        (symbol,) = expr.free_symbols
        if symbol in self.values:
            return
        wanted = 1 if dim == 0 else self.length if one.is_tokens and dim == 1 else None
        if wanted is None:
            return
        factor = int(expr.as_coeff_Mul()[0]) if expr.as_coeff_Mul()[0].is_Integer else 1
        self.values[symbol] = self._allowed(symbol, max(1, wanted // factor))

    def _allowed(self, symbol: Any, wanted: int) -> int:
        """The number nearest to `wanted` that the trace allows."""
        bounds = self.exported.range_constraints.get(symbol)
        low, high = getattr(bounds, "lower", None), getattr(bounds, "upper", None)
        if isinstance(low, sympy.Integer) and low > _ALWAYS:
            wanted = max(wanted, int(low))
        return min(wanted, int(high)) if isinstance(high, sympy.Integer) else wanted

    def _size(self, size: Any) -> int:
        if isinstance(size, int) or not size.node.expr.free_symbols <= self.values.keys():
            return self.example.size(size).size
        return int(size.node.expr.subs(self.values))


def value_shapes(exported: ExportedProgram, workload: Workload) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all values of a graph in a call."""
    sizes = ExampleSizes(exported, workload.shapes)
    result = {}
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else (value,)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        if any(not isinstance(s, int) for t in tensors for s in t.shape):
            result[node.name] = [tuple(sizes.size(s).size for s in t.shape) for t in tensors]
    return result


def _is_taken(exported: ExportedProgram, workload: Workload) -> bool:
    """Whether all sizes that follow from those of a call make sense."""
    try:
        found = value_shapes(exported, workload)
    except (ArithmeticError, TypeError, ValueError):  # such as a division by a batch less one
        return False
    return all(size >= 0 for shapes in found.values() for shape in shapes for size in shape)


def example_at(exported: ExportedProgram, example: Example, workload: Workload) -> Example:
    """Example inputs, repeated or cut to the sizes of a call."""
    names = input_names(exported)
    leaves = flat_inputs(exported, example)
    sized = [
        _stretched(leaf, workload.shapes[name]) if name in workload.shapes else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    layout = exported.call_spec.in_spec
    if layout is None:
        return tuple(sized), {}
    args, kwargs = pytree.tree_unflatten(sized, layout)
    return args, kwargs


def _stretched(value: Any, shape: Sequence[int]) -> Any:
    """A tensor of this shape, with the values of another over and over."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) == tuple(shape):
        return value
    times = [-(-new // old) for new, old in zip(shape, value.shape, strict=True)]
    return value.repeat(times)[tuple(slice(new) for new in shape)]
