"""The masked model as an ONNX graph: the dense one, with removed coordinates set to zero.

It is what a slim ONNX model has to equal, and nothing in it is cut. Behind every operator, removed
coordinates of its results are set to zero; operators that would notice the zeros get other
neutral elements, or are computed over the kept coordinates by formulas of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphprune.analysis.structure import Block
from graphprune.axes import Keep, mask
from graphprune.errors import VerifyError
from graphprune.ir.onnx.shapes.sizes import Known
from graphprune.ops import Typing
from graphprune.ops.families.pointwise import wrap
from graphprune.ops.registry import RuleTable
from graphprune.oracle import masked_contrib  # noqa: F401  (it registers formulas)
from graphprune.oracle.onnx_masking import Call, Formula, Masking


def mask_onnx(
    model: ir.Model,
    known: Mapping[str, Known],
    typing: Typing,
    keep: Keep,
    cuts: Iterable[Block] = (),
) -> None:
    """Make the masked model of a model, in place, for inputs of the first example's sizes.

    Args:
        model: as `read_onnx` gives it.
        known: what `known_values` found for it.
        typing: what `infer_onnx` found for it.
        keep: masks of the pruned axes.
        cuts: removed layers, those of a stack in order.

    Raises:
        VerifyError: an operator over a pruned axis has no formula.
    """
    Masking(model, known, typing, keep).run(cuts)


_formula = RuleTable[Formula]("masked", "onnx.").rule


@_formula("Softmax", "LogSoftmax")
def _softmax(call: Call) -> None:
    rank = len(call.dims)
    old = call.masking.version < 13  # then over all dimensions from `axis` on
    axis = wrap(int(call.get("axis", 1 if old else -1)), rank)
    if call.touched(range(axis, rank) if old else [axis]):
        call.neutral(call.limits[0])


@_formula("ReduceMax", "ReduceLogSumExp")
def _largest(call: Call) -> None:
    if call.touched(call.axes()):
        call.neutral(call.limits[0])


@_formula("ReduceMin")
def _smallest(call: Call) -> None:
    if call.touched(call.axes()):
        call.neutral(call.limits[1])


@_formula("ReduceProd")
def _product(call: Call) -> None:
    if call.touched(call.axes()):
        call.neutral(1)


@_formula("ArgMax", "ArgMin", "TopK")
def _places(call: Call) -> None:
    default = -1 if call.node.op_type == "TopK" else 0
    if call.touched([wrap(int(call.get("axis", default)), len(call.dims))]):
        least = call.node.op_type == "ArgMin" or not call.get("largest", 1)
        call.neutral(call.limits[1 if least else 0])


@_formula("ReduceMean")
def _mean(call: Call) -> None:
    axes = call.axes()
    if not call.touched(axes) or call.x is None:
        return
    if np.issubdtype(call.dtype, np.integer):
        raise VerifyError(
            "the mean of integers over a pruned axis has no masked form in ONNX",
            where=call.node.name,
            hint="leave the axis out of the plan (exclude=)",
        )
    # The operator divides by the number of all places. Its operand makes up for that, since its
    # result may be an output of the model.
    whole = math.prod(call.dims[i].size for i in axes)
    call.node.replace_input_with(
        0, call.make("Mul", call.x, call.number(whole / call.counts(axes)))
    )


@_formula("LayerNormalization", "RMSNormalization")
def _trailing_norm(call: Call) -> None:
    axis = wrap(int(call.get("axis", -1)), len(call.dims))
    axes = range(axis, len(call.dims))
    if not call.touched(axes) or call.x is None:
        return
    centred = call.node.op_type == "LayerNormalization"
    chosen = call.masking.mask_value(call.dims)
    normalised = call.normalised(call.x, chosen, axes, call.counts(axes), centred=centred)
    result = call.make("Mul", normalised, call.node.inputs[1])
    if len(call.node.inputs) > 2 and call.node.inputs[2] is not None:
        result = call.make("Add", result, call.node.inputs[2])
    call.replace(result)


@_formula("InstanceNormalization")
def _instance_norm(call: Call) -> None:
    axes = range(2, len(call.dims))
    if not call.touched(axes) or call.x is None:
        return
    chosen = call.masking.mask_value(call.dims)
    result = call.normalised(call.x, chosen, axes, call.counts(axes), centred=True)
    for op_type, position in (("Mul", 1), ("Add", 2)):
        given = call.node.inputs[position]
        if given is not None:
            each = call.reshape(given, [1, -1, *(1 for _ in axes)])
            result = call.make(op_type, result, each)
    call.replace(result)


@_formula("GroupNormalization")
def _group_norm(call: Call) -> None:
    """Groups apart, ``[batch, groups, channels, places]``, then as they were."""
    if not call.touched([1]) or call.x is None:
        return
    groups = int(call.get("num_groups", 1))
    batch, channels, *space = (e.size for e in call.dims)
    kept = mask(call.dims[1], call.masking.keep).reshape(1, groups, -1, 1)
    counts = kept.sum(axis=2, keepdims=True) * math.prod(space)
    apart = call.reshape(call.x, [batch, groups, channels // groups, math.prod(space)])
    chosen = call.editor.constant(kept, "graphprune_mask")
    result = call.normalised(apart, chosen, [2, 3], np.maximum(counts, 1), centred=True)
    # Scales and shifts are of every channel, or of every group in older opsets.
    each = call.masking.known[call.read(1)].shapes[0][0] // groups
    for op_type, position in (("Mul", 1), ("Add", 2)):
        given = call.node.inputs[position]
        if given is not None:
            result = call.make(op_type, result, call.reshape(given, [1, groups, each, 1]))
    call.replace(call.reshape(result, [batch, channels, *space]))
