"""The second file of an ONNX model, with its large weights.

It is called ``NAME.onnx.DIGEST.data`` by its content (see `graphprune.files.parts`), so that a new
model and an older one of the same name never read each other's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from graphprune.files.parts import part_name

_LOCATION = "location"


def name_data(file: Path) -> None:
    """Give the second file of a model its name, if there is one.

    Args:
        file: the model, just written; its second file is ``<file>.data``.
    """
    data = file.with_name(f"{file.name}.data")
    if not data.is_file():
        return
    model = onnx.load(file, load_external_data=False)
    named = data.rename(file.with_name(part_name(file.name, data)))
    for entry in _locations(model):
        if entry.value == data.name:
            entry.value = named.name
    file.write_bytes(model.SerializeToString())


def data_files(file: Path) -> list[Path]:
    """The files beside a model that its weights are in.

    Args:
        file: an ONNX model.

    Raises:
        google.protobuf.message.DecodeError: it is none.
    """
    model = onnx.load(file, load_external_data=False)
    names = dict.fromkeys(entry.value for entry in _locations(model))
    return [path for name in names if (path := file.parent / name).is_file()]


def _locations(model: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    """Where the tensors of a model say that their data is."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.StringStringEntryProto]:
    for tensor in graph.initializer:
        yield from _of_tensor(tensor)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: object) -> Iterator[onnx.StringStringEntryProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            for tensor in (attribute.t, *attribute.tensors):
                yield from _of_tensor(tensor)
            for graph in (attribute.g, *attribute.graphs):
                yield from _in_graph(graph)


def _of_tensor(tensor: onnx.TensorProto) -> Iterator[onnx.StringStringEntryProto]:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        yield from (entry for entry in tensor.external_data if entry.key == _LOCATION)
