"""Formulas of the masked model for ONNX Runtime's own operators.

Those that only multiply and add, attention among them, are right with zeros at the removed
coordinates and need none. The others are computed by standard operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphprune.axes import mask
from graphprune.errors import VerifyError
from graphprune.ir.onnx.edit import set_attribute
from graphprune.ops.registry import RuleTable
from graphprune.oracle.onnx_masking import Call, Formula

DOMAIN = "com.microsoft."
FUSED_EPSILON = 1e-12  # the default of operators that fuse a sum and a norm

_formula = RuleTable[Formula]("masked", "onnx.").rule


@_formula("SimplifiedLayerNormalization")
def _root_mean_square(call: Call) -> None:
    axes = range(int(call.get("axis", -1)) % len(call.dims), len(call.dims))
    if call.touched(axes) and call.x is not None:
        scaled = _normalised(call, call.x, axes, [(1, "Mul")], centred=False)
        _replace(call, scaled, results=2)


@_formula(f"{DOMAIN}SkipLayerNormalization", f"{DOMAIN}SkipSimplifiedLayerNormalization")
def _skip_norm(call: Call) -> None:
    """The other result, the sum, is right as it is."""
    axes = [len(call.dims) - 1]
    if not call.touched(axes) or call.x is None:
        return
    centred = not call.node.op_type.startswith("SkipSimplified")
    total = call.make("Add", call.x, call.node.inputs[1])
    bias = _input(call, 4 if centred else 3)
    if bias is not None:
        total = call.make("Add", total, bias)
    _default_epsilon(call, FUSED_EPSILON)
    steps = [(2, "Mul"), (3, "Add")] if centred else [(2, "Mul")]
    _replace(call, _normalised(call, total, axes, steps, centred=centred), results=3)


@_formula(f"{DOMAIN}EmbedLayerNormalization")
def _embedding_norm(call: Call) -> None:
    """The other results, a number of tokens and the embedding, are right as they are."""
    length = call.dims[1].size
    call.about(call.node.outputs[0].name or "")
    if not call.touched([2]):
        return
    total = None
    for table, index in ((2, 0), (3, 8), (4, 1)):
        rows, places = _input(call, table), _input(call, index)
        if rows is None:
            continue
        if places is None:
            places = call.editor.constant(np.arange(length)[None], "graphprune_places")
        found = call.make("Gather", rows, places)
        total = found if total is None else call.make("Add", total, found)
    if total is not None:
        _default_epsilon(call, FUSED_EPSILON)
        steps = [(5, "Mul"), (6, "Add")]
        _replace(call, _normalised(call, total, [2], steps, centred=True), results=1)


@_formula(f"{DOMAIN}GroupNorm", f"{DOMAIN}SkipGroupNorm")
def _group_norm(call: Call) -> None:
    """Groups apart, ``[batch, places, groups, channels]``, then as they were."""
    last = bool(call.get("channels_last", 1))
    rank = len(call.dims)
    axis = rank - 1 if last else 1
    if not call.touched([axis]) or call.x is None:
        return
    total = call.x
    skip, bias = _input(call, 3), _input(call, 4)
    if skip is not None:
        given = call.masking.known[call.read(3)].shapes[0]
        if len(given) == 2:
            ones = [1] * (rank - 2)
            skip = call.reshape(skip, [given[0], *ones, given[1]] if last else [*given, *ones])
        total = call.make("Add", total, skip)
    if bias is not None:
        bias = bias if last else call.reshape(bias, [-1, *[1] * (rank - 2)])
        total = call.make("Add", total, bias)
    groups = int(call.get("groups", 1))
    sizes = [e.size for e in call.dims]
    size, places = sizes[axis], math.prod(sizes) // sizes[0] // sizes[axis]
    inner = size // groups
    flat = [sizes[0], places, groups, inner] if last else [sizes[0], groups, inner, places]
    each = [groups, inner] if last else [groups, inner, 1]
    kept = mask(call.dims[axis], call.masking.keep).reshape(each)
    over = [1, 3] if last else [2, 3]
    counts = kept.sum(axis=1, keepdims=True).reshape([groups, 1]) * places
    chosen = call.editor.constant(kept, "graphprune_mask")
    shape = [1, 1, groups, 1] if last else [1, groups, 1, 1]
    found = call.normalised(
        call.reshape(total, flat), chosen, over, np.maximum(counts, 1).reshape(shape), centred=True
    )
    for op_type, position in (("Mul", 1), ("Add", 2)):
        parameter = _input(call, position)
        if parameter is not None:
            found = call.make(op_type, found, call.reshape(parameter, each))
    if call.get("activation", 0):
        found = call.make("Mul", found, call.make("Sigmoid", found))
    _replace(call, call.reshape(found, sizes), results=1)


@_formula(f"{DOMAIN}MoE")
def _experts(call: Call) -> None:
    """Removed experts get the lowest number from the router, so that none is chosen."""
    router = call.node.inputs[1]
    if router is None:
        return
    call.about(call.read(1))
    if call.touched([len(call.dims) - 1]):
        chosen = call.masking.mask_value(call.dims)
        lowest = call.number(call.limits[0])
        call.node.replace_input_with(1, call.make("Where", chosen, router, lowest))


def _input(call: Call, position: int) -> ir.Value | None:
    inputs = call.node.inputs
    return inputs[position] if position < len(inputs) else None


def _default_epsilon(call: Call, value: float) -> None:
    if "epsilon" not in call.node.attributes:
        set_attribute(call.node, "epsilon", value)


def _normalised(
    call: Call,
    x: ir.Value,
    axes: Sequence[int],
    steps: Sequence[tuple[int, str]],
    *,
    centred: bool,
) -> ir.Value:
    """`x` by its statistics over what is kept, then scaled and shifted by inputs of `call`."""
    chosen = call.masking.mask_value(call.dims)
    result = call.normalised(x, chosen, axes, call.counts(axes), centred=centred)
    for position, op_type in steps:
        given = _input(call, position)
        if given is not None:
            result = call.make(op_type, result, given)
    return result


def _replace(call: Call, value: ir.Value, results: int) -> None:
    """Let `value` take the place of the first result, others than `results` being right."""
    if any(v.uses() for v in call.node.outputs[1:results]):
        raise VerifyError(
            f"statistics of {call.node.op_type} over a pruned axis are read", where=call.node.name
        )
    result = call.node.outputs[0]
    chosen = call.masking.mask_value(call.masking.dims(result))
    if chosen is not None:
        value = call.make("Where", chosen, value, call.number(0.0))
    result.replace_all_uses_with(value)
