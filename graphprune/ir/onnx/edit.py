"""Small edits of ONNX graphs that the rewriter and the masked oracle are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Editor:
    """Adds constants and operators to a graph under names that it doesn't have yet."""

    def __init__(self, graph: ir.Graph) -> None:
        """An editor of `graph`."""
        self.graph = graph
        self._names = {v.name for n in graph for v in n.outputs}
        self._names |= {v.name for v in graph.inputs} | set(graph.initializers)

    def name(self, base: str) -> str:
        """A new name that begins with `base`."""
        name, number = base, 0
        while name in self._names:
            number += 1
            name = f"{base}.{number}"
        self._names.add(name)
        return name

    def constant(self, values: NDArray[Any], base: str) -> ir.Value:
        """A new initialiser."""
        name = self.name(base)
        return self.initializer(ir.tensor(np.ascontiguousarray(values), name=name), name)

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """A new initialiser with a name that is free."""
        return ir.tape.Tape(self.graph).initializer(tensor, name)

    def before(
        self,
        place: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        base: str = "",
    ) -> ir.Value:
        """The result of a new operator before another one."""
        node = self._node(op_type, inputs, attributes, base)
        self.graph.insert_before(place, node)
        return node.outputs[0]

    def after(
        self,
        place: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        base: str = "",
    ) -> ir.Value:
        """The result of a new operator behind another one."""
        node = self._node(op_type, inputs, attributes, base)
        self.graph.insert_after(place, node)
        return node.outputs[0]

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None,
        base: str,
    ) -> ir.Node:
        node = ir.node(op_type, inputs=inputs, attributes=attributes or {})
        node.outputs[0].name = node.name = self.name(base or f"graphprune_{op_type.lower()}")
        return node


def set_input(node: ir.Node, position: int, value: ir.Value) -> None:
    """Give a node an input that it may not have had."""
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)


def set_attribute(node: ir.Node, name: str, value: int | float | Sequence[int]) -> None:
    """Write an attribute."""
    node.attributes.add(ir.convenience.convert_attributes({name: value})[0])
