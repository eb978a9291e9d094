"""The sizes of a call of an ONNX graph, and of all its values then."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphprune.analysis.workload import Shapes, Workload
from graphprune.errors import LoadError
from graphprune.ir.onnx.shapes.sizes import Known, shapes_at
from graphprune.ir.onnx.signature import inputs_of_model


def workload_of_model(model: ir.Model, values: Mapping[str, Known], length: int) -> Workload:
    """One sample, if the model takes it, else its first example.

    Args:
        model: the model.
        values: what is known about its values.
        length: of what it leaves open, but for the batch.
    """
    found = list(inputs_of_model(model, values))
    tokens = bool(found) and all(i.is_tokens for i in found)
    example = {i.name: values[i.name].shapes[0] for i in found}
    for other in (length, None):
        shapes = _open_sizes(model, values, example, other)
        try:
            known_at(model, values, Workload(shapes))
        except LoadError:
            continue
        return Workload(shapes, tokens)
    return Workload(example, tokens)


def _open_sizes(
    model: ir.Model, values: Mapping[str, Known], example: Shapes, length: int | None
) -> Shapes:
    """A batch of one, and `length` (or the example's sizes) along what else is open."""
    named: dict[str, int] = {}
    result = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name not in example:
            continue
        shape = []
        for i, size in enumerate(values[name].sizes):
            wanted = size.size
            if size.dynamic:
                wanted = 1 if i == 0 else size.size if length is None else length
                symbol = getattr(value.shape[i], "value", None) if value.shape is not None else None
                if symbol:  # names stand for one size, and sums of names for the sum
                    wanted = sum(named.setdefault(n, wanted) for n in symbol.split(" + "))
            shape.append(wanted)
        result[name] = tuple(shape)
    return result


def known_at(
    model: ir.Model, values: Mapping[str, Known], workload: Workload
) -> Mapping[str, Known]:
    """What is known about the values of an ONNX graph in a call of these sizes.

    Raises:
        LoadError: the model doesn't take them.
    """
    if all(values[n].shapes[0] == shape for n, shape in workload.shapes.items()):
        return values
    return shapes_at(model, workload.shapes)
