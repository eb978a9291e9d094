"""A serialised ``torch.export`` program, walked by PyTorch's own schema before it is built.

The schema (dataclasses in ``torch._export.serde.schema``) says which field is read as what. Every
text in it has a check in `TEXTS`; a field that isn't listed there, of a PyTorch that is newer than
this file, makes programs that use it need trust, until somebody has looked at what becomes of it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from graphprune.frontends.pt2 import text
from graphprune.frontends.pt2.text import Check, refused

TEXTS: Mapping[str, Check] = {
    "Argument.as_operator": text.operator,
    "Argument.as_string": text.free,
    "Argument.as_strings": text.free,
    "BufferMutationSpec.buffer_name": text.path,
    "ConstantValue.as_string": text.constant,
    "CustomObjArgument.class_fqn": text.path,
    "CustomObjArgument.name": text.identifier,
    "Device.type": text.device,
    "ExportedProgram.guards_code": text.free,  # `from_exported` drops them
    "ExportedProgram.torch_version": text.free,
    "ExportedProgram.verifiers": text.free,  # looked up in a table
    "GradientToParameterSpec.parameter_name": text.path,
    "GradientToUserInputSpec.user_input_name": text.identifier,
    "GraphArgument.name": text.identifier,
    "GraphModule.metadata": text.free,
    "InputToBufferSpec.buffer_name": text.path,
    "InputToConstantInputSpec.name": text.identifier,
    "InputToCustomObjSpec.custom_obj_name": text.path,
    "InputToParameterSpec.parameter_name": text.path,
    "InputToTensorConstantSpec.tensor_constant_name": text.path,
    "ModuleCallEntry.fqn": text.path,
    "ModuleCallSignature.forward_arg_names": text.identifier,
    "ModuleCallSignature.in_spec": text.keywords,
    "ModuleCallSignature.out_spec": text.treespec,
    "NamedArgument.name": text.identifier,
    "NamedTupleDef.field_names": text.free,
    "Node.metadata": text.free,
    "Node.name": text.identifier,
    "Node.target": text.operator,
    "ParameterMutationSpec.parameter_name": text.path,
    "PayloadMeta.path_name": text.payload,
    "SymBoolArgument.as_name": text.identifier,
    "SymExpr.expr_str": text.expression,
    "SymFloatArgument.as_name": text.identifier,
    "SymIntArgument.as_name": text.identifier,
    "TensorArgument.name": text.identifier,
    "TokenArgument.name": text.identifier,
    "UserInputMutationSpec.user_input_name": text.identifier,
}
"""Class and field of the schema to the check of its text, or of the texts in it."""

KEYS: Mapping[str, Check] = {
    "Argument.as_string_to_argument": text.identifier,
    "ExportedProgram.opset_version": text.free,
    "ExportedProgram.range_constraints": text.symbol,
    "Graph.custom_obj_values": text.identifier,
    "Graph.sym_bool_values": text.identifier,
    "Graph.sym_float_values": text.identifier,
    "Graph.sym_int_values": text.identifier,
    "Graph.tensor_values": text.identifier,
    "GraphModule.metadata": text.free,
    "GraphModule.treespec_namedtuple_fields": text.free,
    "Node.metadata": text.free,
    "PayloadConfig.config": text.path,
}
"""Likewise for the keys of mappings."""

_NUMBERS = ("Infinity", "-Infinity", "NaN")


def check_program(data: Any, where: str) -> None:
    """See that nothing in a program, as JSON gives it, becomes code.

    Raises:
        LoadError: it has something that would, or that we don't know.
    """
    _check(schema.ExportedProgram, data, where, "")


def check_payloads(data: Any, where: str) -> None:
    """The same for the list of the tensors that belong to a program.

    Raises:
        LoadError: see `check_program`.
    """
    _check(schema.PayloadConfig, data, where, "")


@cache
def fields(kind: type) -> Mapping[str, Any]:
    """The fields of a class of the schema and what they hold."""
    return typing.get_type_hints(kind, globalns=vars(schema))


def texts_and_keys() -> tuple[set[str], set[str]]:
    """The fields of this PyTorch's schema that hold text, and those with texts as keys."""
    texts: set[str] = set()
    keys: set[str] = set()
    waiting: list[tuple[Any, str]] = [(schema.ExportedProgram, ""), (schema.PayloadConfig, "")]
    seen: set[Any] = set()
    while waiting:
        kind, field = waiting.pop()
        if dataclasses.is_dataclass(kind) and kind not in seen:
            seen.add(kind)
            known = fields(typing.cast("type", kind))
            waiting += [(k, f"{kind.__name__}.{n}") for n, k in known.items()]  # type: ignore[union-attr]
        elif kind is str:
            texts.add(field)
        elif typing.get_origin(kind) is dict:
            keys.add(field)
            waiting.append((typing.get_args(kind)[1], field))
        else:
            waiting += [(inner, field) for inner in typing.get_args(kind)]
    return texts, keys


def _check(kind: Any, data: Any, where: str, field: str) -> None:
    """Check a value against a type of the schema; `field` is where it lies, for texts."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if data is not None:
            _check(typing.get_args(kind)[0], data, where, field)
    elif origin is list:
        _expect(isinstance(data, list), kind, where, field)
        for index, one in enumerate(data):
            _check(typing.get_args(kind)[0], one, f"{where}[{index}]", field)
    elif origin is dict:
        _expect(isinstance(data, dict), kind, where, field)
        for key, one in data.items():
            _look_up(KEYS, field, where)(key, where)
            _check(typing.get_args(kind)[1], one, f"{where}[{key[:60]!r}]", field)
    elif dataclasses.is_dataclass(kind):
        _check_fields(typing.cast("type", kind), data, where)
    elif kind is str:
        _expect(isinstance(data, str), kind, where, field)
        _look_up(TEXTS, field, where)(data, where)
    else:
        _expect(_is_number(kind, data), kind, where, field)


def _check_fields(kind: type, data: Any, where: str) -> None:
    known = fields(kind)
    _expect(isinstance(data, dict), kind, where, kind.__name__)
    if issubclass(kind, _Union):
        _expect(len(data) == 1 and next(iter(data)) in known, kind, where, kind.__name__)
    for name, inner in known.items():
        if name in data:  # PyTorch passes over what it doesn't know
            _check(inner, data[name], f"{where}.{name}", f"{kind.__name__}.{name}")
    if kind is schema.Graph:
        for index, entry in enumerate(data.get("inputs", ())):
            if "as_string" in entry:
                text.constant(entry["as_string"], f"{where}.inputs[{index}]")
    if kind is schema.Node:
        text.origin(data.get("metadata", {}).get("source_fn_stack", ""), where)


def _is_number(kind: Any, data: Any) -> bool:
    if kind is float:
        return isinstance(data, int | float) or data in _NUMBERS
    if kind is bool:
        return isinstance(data, bool)
    if isinstance(kind, type) and issubclass(kind, int | IntEnum):
        return isinstance(data, int) and -(2**63) <= data < 2**64
    return False


def _look_up(table: Mapping[str, Check], field: str, where: str) -> Check:
    if field not in table:
        raise refused(
            f"the file has a field that we don't know: {field}",
            where,
            "it is of a newer torch, and may be evaluated",
        )
    return table[field]


def _expect(fits: bool, kind: Any, where: str, field: str) -> None:
    if not fits:
        name = getattr(kind, "__name__", str(kind))
        raise refused("the program isn't as PyTorch writes it", where, f"{field} is no {name}")
