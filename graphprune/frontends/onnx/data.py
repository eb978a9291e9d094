"""External data of an ONNX file: what is taken for it, and what is refused.

A model from elsewhere must not make us read, and put into the output, any other file of the user.
The rules are ONNX Runtime's, so that what compiles also runs:

* a location is a relative path without ``..``;
* with all symbolic links followed, the data lies in the folder of the model's path or below, or in
  the folder of the file that this path leads to. The second is how a Hugging Face cache looks: the
  model and its data are links into one folder of blobs;
* a file under several names (hard links) is refused: nobody can tell where else it belongs. The
  onnx package refuses it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeAlias

import onnx
import onnx_ir as ir

from graphprune.errors import LoadError
from graphprune.ir.onnx.tensors import Mapped

Kind = onnx.AttributeProto
Put: TypeAlias = "Callable[[ir.TensorProtocol], None]"


def bind_data(model: ir.Model, path: Path) -> None:
    """Check the external data of a model, and map it in place of what the model refers to.

    Args:
        model: as it was read from the file; changed in place.
        path: the file.

    Raises:
        LoadError: some of it is missing, damaged, or not the model's.
    """
    for tensor, put in _external(model):
        put(Mapped(tensor, _file(tensor, path)))


def _external(model: ir.Model) -> Iterator[tuple[ir.ExternalTensor, Put]]:
    """Every external tensor, with a function that puts another one in its place."""
    functions = [function.graph for function in model.functions.values()]
    inner = [graph for function in functions for graph in function.subgraphs()]
    for graph in (*model.graphs(), *functions, *inner):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value, partial(setattr, value, "const_value")
        for node in graph:
            for attribute in list(node.attributes.values()):
                yield from _of_attribute(node, attribute)


def _of_attribute(node: ir.Node, attribute: ir.Attr) -> Iterator[tuple[ir.ExternalTensor, Put]]:
    if isinstance(attribute.value, ir.ExternalTensor):
        yield (
            attribute.value,
            lambda tensor: node.attributes.add(ir.AttrTensor(attribute.name, tensor)),
        )
    elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
        tensors = list(attribute.as_tensors())
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, ir.ExternalTensor):
                yield tensor, partial(tensors.__setitem__, i)
        node.attributes.add(ir.AttrTensors(attribute.name, tensors))


def _file(tensor: ir.ExternalTensor, path: Path) -> Path:
    """Where the data of a tensor really lies.

    Raises:
        LoadError: nowhere, elsewhere, or not all of it.
    """
    location = str(tensor.location)
    shown = repr(location if len(location) < 100 else f"{location[:100]}...")
    offset, size = tensor.offset or 0, tensor.nbytes
    hint = "copy the data file to the folder of the model"
    windows = PureWindowsPath(location)  # knows both separators and drives
    if not location or windows.anchor or PurePosixPath(location).anchor or ".." in windows.parts:
        why = f"{shown} lies outside of the model's folder"
        raise _refused(tensor, path, why, "the file may have been made to read others: mistrust it")
    try:
        file = (path.parent / location).resolve()
        folders = {path.parent.resolve(), path.resolve().parent}
        there = file.is_file()
        status = file.stat() if there else None
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, or no name of a file
        why = getattr(error, "strerror", None) or str(error)[:100]
        raise _refused(tensor, path, f"{shown}: {why}", hint) from None
    if not any(file.is_relative_to(folder) for folder in folders):
        why = f"{shown} is a link that leads outside of the model's folder"
    elif status is None:
        why = f"{shown} is missing"
    elif status.st_nlink > 1:
        why = f"{shown} has {status.st_nlink} hard links: it may be another file of yours"
    elif offset < 0 or (tensor.length is not None and tensor.length != size):
        why = f"{size} bytes are needed, and the model says {tensor.length} from {offset}"
        hint = "export the model again"
    elif status.st_size < offset + size:
        why = f"{shown} is truncated: it has {status.st_size} of {offset + size} bytes"
    else:
        return file
    raise _refused(tensor, path, why, hint)


def _refused(tensor: ir.ExternalTensor, path: Path, why: str, hint: str) -> LoadError:
    return LoadError(
        "the model's external data can't be read",
        where=f"{path}, tensor {tensor.name}",
        why=why,
        hint=hint,
    )


def check(model: onnx.ModelProto, path: Path) -> None:
    """Run the checker; it may not look for external data, since it refuses any symbolic link.

    Args:
        model: what `path` holds; its external tensors are empty afterwards.
        path: a file.

    Raises:
        ValueError: there are sparse initialisers, which the checker knows and we don't.
        onnx.checker.ValidationError: the model is invalid.
    """
    external = _empty(model.graph)
    for function in model.functions:
        external |= _empty_attributes(function.node)
    onnx.checker.check_model(model if external else str(path))


def _empty(graph: onnx.GraphProto) -> bool:
    for sparse in graph.sparse_initializer:
        raise ValueError(f"initialiser {sparse.values.name} is sparse, which is not supported")
    found = [_empty_tensor(tensor) for tensor in graph.initializer]
    return _empty_attributes(graph.node) or any(found)


def _empty_attributes(nodes: Iterable[onnx.NodeProto]) -> bool:
    found = False
    for attribute in (a for node in nodes for a in node.attribute):
        if attribute.type in (Kind.TENSOR, Kind.TENSORS):
            for tensor in (attribute.t, *attribute.tensors):
                found |= _empty_tensor(tensor)
        elif attribute.type in (Kind.GRAPH, Kind.GRAPHS):
            for graph in (attribute.g, *attribute.graphs):
                found |= _empty(graph)
    return found


def _empty_tensor(tensor: onnx.TensorProto) -> bool:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return False
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.dims[:] = [0]
    return True


def check_elements(model: ir.Model) -> None:
    """Check that the initialisers hold as many elements as they say; the checker lets more pass.

    Raises:
        ValueError: one doesn't.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor):
                continue
            try:
                tensor.numpy()
            except Exception as error:  # of any kind
                raise ValueError(f"initialiser {value.name}: {error}") from None
