"""Tensors on the meta device in place of those of a graph, to see what views what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.ir.torch.sizes import ExampleSizes


class StandIns:
    """A tensor without data for each value, of its example size and strides.

    Operators may return their operand or a copy, depending on how that lies in memory (reshape,
    contiguous, to). Called on stand-ins they tell which.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        """Stand-ins for the values of a program, made when they are asked for."""
        self._sizes = ExampleSizes(exported)
        self._known: dict[fx.Node, Any] = {}
        self._results: dict[fx.Node, list[Any]] = {}

    def of(self, node: fx.Node) -> Any:
        """What stands in for a value; numbers are those of the example."""
        if node not in self._known:
            self._known[node] = pytree.tree_map(self._stand_in, node.meta.get("val"))
        return self._known[node]

    def put(self, node: fx.Node, like: torch.Tensor) -> None:
        """Say what stands in for a value."""
        self._known[node] = like

    def call(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What an operator of torch returns for stand-ins of the nodes in its operands."""
        given, named = fx.map_arg((tuple(args), dict(kwargs)), self.of)
        with torch.no_grad():
            return target(*given, **named)

    def results(self, node: fx.Node) -> list[Any]:
        """What the call of a node returns, as a list."""
        if node not in self._results:
            found = self.call(node.target, node.args, node.kwargs)
            several = isinstance(found, list | tuple)
            self._results[node] = list(found) if several else [found]
        return self._results[node]

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape, strides = (
                [self._sizes.size(n).size for n in ns] for ns in (value.shape, value.stride())
            )
            return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
        if isinstance(value, torch.SymInt):
            return self._sizes.size(value).size
        return value


def same_memory(a: Any, b: torch.Tensor) -> bool:
    """Whether a result is a view of an operand, or that itself."""
    return isinstance(a, torch.Tensor) and bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have elements of one type in the same places of memory."""
    facts = [(t.dtype, t.shape, t.storage_offset(), t.is_conj(), t.is_neg()) for t in (a, b)]
    return facts[0] == facts[1] and same_strides(a, b)


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the elements of two tensors of one shape lie alike."""
    return all(
        m == n or size < 2 for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def same_sizes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes of a graph are equal whatever its open sizes are."""
    return [_size(n) for n in a.shape] == [_size(n) for n in b.shape]


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr
