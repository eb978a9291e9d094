"""What an ONNX file says about its tensors beside the operators, where cuts make it wrong.

Annotations name other tensors (scales) and shardings state sizes. None of it changes what the model
computes, and nothing says how it would have to be cut, so what is about a tensor that is cut, or
names one that is cut or gone, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import onnx_ir as ir

# Where onnx-ir keeps the `quantization_annotation` of a graph.
ANNOTATION = "quant_parameter_tensor_names"


def drop_stale(graph: ir.Graph, is_cut: Callable[[str], bool]) -> None:
    """Leave out what a rewritten graph says of tensors that it hasn't got as they were.

    Args:
        graph: changed in place.
        is_cut: whether a tensor of this name is smaller than it was.
    """
    values = {value.name or "": value for value in _values(graph)}
    for name, value in values.items():
        named = [name, *value.meta.get(ANNOTATION, {}).values()]
        if any(n not in values or is_cut(n) for n in named):
            value.meta.pop(ANNOTATION, None)
    for node in graph.all_nodes():
        # Multi-device models, which older versions of onnx-ir don't read.
        placed: Any = getattr(node, "device_configurations", ())
        if placed:
            node.device_configurations = tuple(
                replace(one, sharding_specs=_whole(one.sharding_specs, is_cut)) for one in placed
            )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _whole(specs: tuple[Any, ...], is_cut: Callable[[str], bool]) -> tuple[Any, ...]:
    """The shardings of tensors that aren't cut."""
    return tuple(s for s in specs if s.value is None or not is_cut(s.value.name or ""))
