"""Floating numbers that a graph makes of none, whose dtype it may leave to torch's default.

The default belongs to the whole process, other threads included, so that a run in another dtype
tells each operator instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

_Operator = torch._ops.OpOverload[..., Any]
_WHERE = torch.ops.aten.where
_CHOICES = (_WHERE.Scalar, _WHERE.ScalarOther, _WHERE.ScalarSelf)


def makes_floats(node: fx.Node) -> bool:
    """Whether the result of `node` is floating, and none of its operands is."""
    operands = (i.meta.get("val") for i in node.all_input_nodes)
    return _is_floating(node.meta.get("val")) and not any(map(_is_floating, operands))


def settled(
    target: _Operator, arguments: Mapping[str, Any], dtype: torch.dtype
) -> tuple[_Operator, dict[str, Any]]:
    """The call that gives what `target` would if `dtype` were torch's default.

    Args:
        target: an operator without floating operands, and with a floating result.
        arguments: what it is called on, by name.
        dtype: a floating one.
    """
    given = dict(arguments)
    if "dtype" in _names(target):
        if given.get("dtype") is None:
            given["dtype"] = dtype
        return target, given
    if target in _CHOICES:
        values = {n: torch.as_tensor(v, dtype=dtype) for n, v in given.items() if n != "condition"}
        return _WHERE.self, {"condition": given["condition"], **values}
    return target, {
        name: value.to(dtype) if isinstance(value, Tensor) and name not in _ASKED else value
        for name, value in given.items()
    }


_ASKED = ("condition", "mask")
"""Operands that have to be Boolean."""


@cache
def _names(target: _Operator) -> frozenset[str]:
    return frozenset(a.name for a in target._schema.arguments)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
