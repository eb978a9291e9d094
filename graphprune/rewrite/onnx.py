"""The slim ONNX graph: the dense one with weights cut and every size in it put right.

Shapes that a graph computes from its own constants are folded first. What is left to rewrite are
the operators that take sizes, by attribute or by input; each gets sizes of its own, so that
constants that several of them share are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphprune.axes import Keep
from graphprune.errors import EmitError
from graphprune.ir.onnx.shapes.sizes import Known
from graphprune.ops import Typing
from graphprune.ops.families.pointwise import wrap
from graphprune.ops.registry import RuleTable
from graphprune.rewrite import onnx_contrib  # noqa: F401  (it registers rules)
from graphprune.rewrite.onnx_rewriter import Call, Rewriter, SizeRule


def rewrite_onnx(model: ir.Model, known: Mapping[str, Known], typing: Typing, keep: Keep) -> None:
    """Cut a model in place.

    Weights are cut when they are written, some rows at a time.

    Args:
        model: as `read_onnx` gives it.
        known: what `known_values` found for it.
        typing: what `infer_onnx` found for it.
        keep: masks of the pruned axes.

    Raises:
        EmitError: an operator's sizes can't be rewritten; the model is spoilt.
    """
    Rewriter(model, known, typing, keep).run()


_rule = RuleTable[SizeRule]("sizes", "onnx.").rule


@_rule("Reshape", "Expand")
def _shaped(call: Call) -> None:
    if any(call.touched(e) for e in (*call.results[0], *call.dims(0))):
        call.shape(1)


@_rule("ConstantOfShape")
def _filled(call: Call) -> None:
    call.shape(0)


@_rule("Tile")
def _tiled(call: Call) -> None:
    repeats = call.constant(1)
    pairs = list(zip(call.dims(0), call.results[0], strict=True))
    if any(call.touched(r) for _, r in pairs):
        if repeats is None:
            if all(call.kept(r) * x.size == r.size * call.kept(x) for x, r in pairs):
                return
            raise EmitError("computed repeats can't be cut", where=call.node.name)
        call.write("repeats", 1, [call.kept(r) // call.kept(x) for x, r in pairs])


@_rule("Split")
def _split(call: Call) -> None:
    x = call.dims(0)
    axis = wrap(_int(call.node, "axis", 0), len(x))
    if call.touched(x[axis]):
        call.node.attributes.pop("num_outputs", None)
        call.write("split", 1, [call.kept(dims[axis]) for dims in call.results], since=13)


@_rule("Squeeze")
def _squeeze(call: Call) -> None:
    """What was of size 1 is named, since other dimensions may have a single index left."""
    x = call.dims(0)
    if call.integers("axes", 1) or not any(call.touched(e) for e in x):
        return
    axes = [i for i, e in enumerate(x) if e.size == 1]
    call.write("axes", 1, axes, since=13)


@_rule("Slice")
def _slice(call: Call) -> None:
    x = call.dims(0)
    starts, ends = call.integers("starts", 1), call.integers("ends", 2)
    axes = call.integers("axes", 3) or list(range(len(starts)))
    steps = call.integers("steps", 4) or [1] * len(starts)
    changed = False
    for i, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        e = x[wrap(axis, len(x))]
        if not call.touched(e) or step < 0:  # an axis that is reversed is so as a whole
            continue
        first, last = (min(max(wrap(p, e.size), 0), e.size) for p in (starts[i], ends[i]))
        changed = True
        if step == 1:
            starts[i], ends[i] = call.before(e, first), call.before(e, last)
        else:  # whole blocks of `step` places go or stay, and each has one of the first block
            starts[i], ends[i] = first, call.kept(e)
    if changed:
        call.write("starts", 1, starts)
        call.write("ends", 2, ends)


@_rule("Pad")
def _pad(call: Call) -> None:
    x, pads = call.dims(0), call.integers("pads", 1)
    axes = call.integers("axes", 3) or list(range(len(x)))
    for j, axis in enumerate(axes):
        i = wrap(axis, len(x))
        result = call.results[0][i]
        if call.touched(result):
            before, after = pads[j], pads[j + len(axes)]
            pads[j] = call.before(result, before)
            pads[j + len(axes)] = call.kept(result) - call.before(result, result.size - after)
    call.write("pads", 1, pads)


@_rule("Gather", "GatherND")
def _gather(call: Call) -> None:
    """Constant places are counted anew among those that stay, along the first axis of GatherND."""
    places = call.constant(1)
    e = call.dims(0)[wrap(_int(call.node, "axis", 0), len(call.dims(0)))]
    if places is None or not call.touched(e):
        return
    kept = call.mask(e)
    flat = np.where(places < 0, places + e.size, places).reshape(-1)
    new = (np.cumsum(kept) - 1)[flat[kept[flat]]]
    call.write("indices", 1, new if places.ndim == 1 else new[:, None])


@_rule("Conv", "ConvTranspose", "ConvInteger", "QLinearConv")
def _groups(call: Call) -> None:
    groups = _int(call.node, "group", 1)
    weight = call.dims(3 if call.node.op_type == "QLinearConv" else 1)
    if groups > 1:
        channels = call.mask(weight[0]).reshape(groups, -1)
        call.set_attribute("group", int(channels.any(axis=1).sum()))


@_rule("com.microsoft.MatMulNBits")
def _packed(call: Call) -> None:
    for name, e in (("N", call.results[0][-1]), ("K", call.dims(0)[-1])):
        call.set_attribute(name, call.kept(e))


@_rule("GroupNormalization")
def _groups_of_norm(call: Call) -> None:
    groups = _int(call.node, "num_groups", 1)
    channels = call.mask(call.dims(0)[1]).reshape(groups, -1)
    call.set_attribute("num_groups", int(channels.any(axis=1).sum()))


@_rule("LSTM", "GRU", "RNN")
def _hidden(call: Call) -> None:
    call.set_attribute("hidden_size", call.kept(call.dims(2)[2]))


@_rule("Resize")
def _resize(call: Call) -> None:
    axes = call.integers("axes", len(call.node.inputs))
    rank = len(call.results[0])
    call.shape(3, [wrap(i, rank) for i in axes or range(rank)])


@_rule("Attention")
def _attention(call: Call) -> None:
    q, k = call.dims(0), call.dims(1)
    width = q[-1]
    if len(q) == 3:
        heads = _int(call.node, "q_num_heads", 1)
        other = _int(call.node, "kv_num_heads", 1)
        for name, e, n in (("q_num_heads", q[2], heads), ("kv_num_heads", k[2], other)):
            kept = call.mask(e).reshape(n, -1)
            call.set_attribute(name, int(kept.any(axis=1).sum()))
        size = width.size // heads
    else:
        size = width.size
    if "scale" not in call.node.attributes and any(call.touched(e) for e in (*q, *k)):
        call.set_attribute("scale", 1 / math.sqrt(size))


@_rule("OneHot")
def _depth(call: Call) -> None:
    """As many places as the axis has that is pointed into."""
    depth = call.constant(1)
    if not call.touched(call.results[0][-1]):
        return
    if depth is None:
        raise EmitError(
            "a one-hot axis of a computed size can't be cut",
            where=call.node.name,
            hint="leave the structure out of the plan",
        )
    call.write("depth", 1, np.full(depth.shape, call.kept(call.results[0][-1])))


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes.get_int(name, default))
