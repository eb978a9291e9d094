"""Example sizes of symbolic dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphprune.ir.torch.constants import known_values
from graphprune.ops import Size

DEFAULT = 5


class ExampleSizes:
    """Evaluates symbolic sizes at the example inputs of an exported program.

    A program that was loaded from a file may have lost its example; its symbols then get small
    sizes within their declared ranges.
    """

    def __init__(
        self, exported: ExportedProgram, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Read the values of the symbols off the example inputs and the stored constants.

        Args:
            exported: the program.
            shapes: of inputs that have other sizes than in the example, by name.
        """
        self._values: dict[sympy.Symbol, int] = {}
        names = [
            spec.arg.name
            for spec in exported.graph_signature.input_specs
            if spec.kind == InputKind.USER_INPUT
        ]
        example = exported.example_inputs
        flat = torch.utils._pytree.tree_leaves(example) if example else []
        values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
        for name, shape in (shapes or {}).items():
            self._learn(values[name].shape, shape)
        for name, real in zip(names, flat, strict=False):
            if name in (shapes or {}):
                continue
            fake = values.get(name)
            if isinstance(fake, torch.Tensor) and isinstance(real, torch.Tensor):
                self._learn(fake.shape, real.shape)
        for name, known in _known(exported).items():
            pairs = zip(_items(values.get(name)), _items(known), strict=False)
            for symbolic, real in pairs:
                if isinstance(symbolic, torch.Tensor) and isinstance(real, torch.Tensor):
                    self._learn(symbolic.shape, real.shape)
                elif isinstance(symbolic, torch.SymInt):
                    self._learn((symbolic,), (real,))
        self._ranges = exported.range_constraints

    def _learn(self, symbolic: Iterable[Any], real: Iterable[Any]) -> None:
        for s, r in zip(symbolic, real, strict=True):
            if isinstance(s, torch.SymInt) and isinstance(s.node.expr, sympy.Symbol):
                self._values[s.node.expr] = int(r)

    def size(self, value: int | torch.SymInt) -> Size:
        """`value` in the example."""
        if isinstance(value, int):
            return Size(value)
        expr = value.node.expr
        if expr.is_number:
            return Size(int(expr))
        for symbol in expr.free_symbols:
            self._values.setdefault(symbol, self._default(symbol))
        return Size(int(expr.subs(self._values)), True, factor=int(expr.as_coeff_Mul()[0]))

    def _default(self, symbol: sympy.Symbol) -> int:
        bounds = self._ranges.get(symbol)
        if bounds is None:
            return DEFAULT
        low, high = bounds.lower, bounds.upper
        return int(max(low, min(high, DEFAULT)))


def _known(exported: ExportedProgram) -> dict[str, Any]:
    """What follows from constants, where the graph asks for values."""
    specs = exported.graph_signature.input_specs
    stored = {s.arg.name: s.target for s in specs if s.target is not None}
    state = {**exported.constants, **exported.state_dict}
    return known_values(exported.graph, stored, state.get)


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
