"""Comparing quantised models in pieces, from one quantisation step to the next.

Quantising rounds. The slim model adds up fewer zeros than the masked one, in another order, so
their numbers differ in the last bits; wherever such a number lies close to a boundary between two
integers, the two models round it to different ones, are a whole step apart, and carry that on.
Neither is wrong, and a tolerance that lets whole steps pass would let mistakes pass.

So the models are compared where nothing has been rounded yet. At every operator that quantises, the
slim model's operand has to equal the masked one's at the kept coordinates, within the tolerance of
all comparisons, and within half a step, so that rounding can move it to a neighbour at most. Then
the slim model goes on with the masked model's operand, which both round alike. Every operator of
both models is run, and every number between two steps is compared without any rounding in it: by
induction both compute the same, but for rounding at the steps that were counted.

PyTorch's numeric suite compares a quantised model to its original in the same way: each quantised
module has a shadow that gets the other's inputs
(https://docs.pytorch.org/docs/stable/torch.ao.ns._numeric_suite.html).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from graphprune.axes import Keep, count, mask, product, touched
from graphprune.errors import VerifyError
from graphprune.ir.onnx.files import temporary_file
from graphprune.ir.onnx.ort import register_libraries
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.oracle.verification import Difference, compare

# Operators that quantise their first operand, by a range that is given or by its own.
_QUANTISING = {
    ("", "QuantizeLinear"),
    ("", "DynamicQuantizeLinear"),
    ("com.microsoft", "QuantizeLinear"),
    ("com.microsoft", "DynamicQuantizeMatMul"),
    ("com.microsoft", "DynamicQuantizeLSTM"),
}
_INT8 = 4  # the accuracy level of MatMulNBits at which it does, too

# Errors of this part of the tolerance are those of arithmetic, however small a step is.
_ARITHMETIC = 1e-2


class Steps(NamedTuple):
    """A comparison at every quantisation step.

    Attributes:
        differences: of the operands of all steps, then of the outputs.
        number: how many steps there are.
        drift: the largest difference of outputs where the slim model goes on with its own numbers.
    """

    differences: list[Difference]
    number: int
    drift: float


def has_steps(model: ir.Model) -> bool:
    """Whether a graph quantises anything but its weights and inputs."""
    return bool(_steps(model))


def compare_steps(
    program: OnnxProgram,
    keep: Keep,
    masked: ir.Model,
    slim: ir.Model,
    feeds: Mapping[str, NDArray[Any]],
    numbers: Callable[[Any], torch.Tensor],
    tolerance: float,
) -> Steps:
    """Compare a slim and a masked model at their quantisation steps, and their outputs.

    Both run in ONNX Runtime without its optimisations: it fuses what it knows into operators that
    round, and what it knows of the slim model, the masked one's masks keep it from seeing.

    Args:
        program: the dense program.
        keep: masks of the pruned axes.
        masked: the masked model; spoilt.
        slim: the slim model; spoilt.
        feeds: input name to array.
        numbers: an output of the runtime as a tensor.
        tolerance: in parts of max(1, largest value).

    Raises:
        VerifyError: ONNX Runtime can't run one of the models as it is.
    """
    nodes, names = _steps(program.model), [v.name or "" for v in program.model.graph.outputs]
    theirs, own = _steps(masked), _steps(slim)
    keys = [key for key in nodes if key in theirs and key in own]
    shown = [_watch(masked, theirs[key]) for key in keys]
    expected = _run(masked, feeds, [*names, *shown])
    outputs = [numbers(expected[n]) for n in names]

    def compared(found: Mapping[str, Any]) -> list[Difference]:
        return compare(names, outputs, [numbers(found[n]) for n in names], tolerance)

    drift = max((d.error for d in compared(_run(slim, feeds, names))), default=0.0)
    given, watched, wanted = dict(feeds), [], []
    for key, name in zip(keys, shown, strict=True):
        wanted.append(_kept(program, nodes[key], expected[name], keep))
        watched.append(_watch(slim, own[key]))
        given[_feed(slim, own[key], wanted[-1])] = wanted[-1]
    try:
        found = _run(slim, given, [*names, *watched])
    except VerifyError as error:  # what a wrong graph raises is a failure, not a crash
        why = f"the slim model doesn't run on the masked model's numbers: {error.why}"
        return Steps([Difference(n, np.inf, 0.0, why) for n in names], len(keys), drift)
    differences = [
        _at_step(program, nodes[key], name, want, found[name], tolerance)
        for key, name, want in zip(keys, watched, wanted, strict=True)
    ]
    return Steps([*differences, *compared(found)], len(keys), drift)


def _steps(model: ir.Model) -> dict[str, ir.Node]:
    """Operators that quantise what others compute, by the name of their first result."""
    found = {}
    for node in model.graph:
        domain = "" if node.domain == "ai.onnx" else node.domain
        level = node.attributes.get_int("accuracy_level", 0)
        packed = (domain, node.op_type) == ("com.microsoft", "MatMulNBits") and level == _INT8
        if packed or (domain, node.op_type) in _QUANTISING:
            operand = node.inputs[0]
            if operand is not None and operand.producer() is not None:
                found[node.outputs[0].name or ""] = node
    return found


def _watch(model: ir.Model, node: ir.Node) -> str:
    """Make an output of what a step reads."""
    operand = node.inputs[0]
    assert operand is not None
    if operand not in model.graph.outputs:
        model.graph.outputs.append(operand)
    return operand.name or ""


def _feed(model: ir.Model, node: ir.Node, values: NDArray[Any]) -> str:
    """Let a step read an input instead; steps that read the same value share one."""
    operand = node.inputs[0]
    assert operand is not None
    name = f"graphprune_given.{operand.name}"
    known = {v.name: v for v in model.graph.inputs}
    if name not in known:
        kind = ir.TensorType(ir.DataType.from_numpy(values.dtype))
        known[name] = ir.Value(name=name, type=kind, shape=ir.Shape(values.shape))
        model.graph.inputs.append(known[name])
    node.replace_input_with(0, known[name])
    return name


def _kept(program: OnnxProgram, node: ir.Node, values: NDArray[Any], keep: Keep) -> NDArray[Any]:
    """What the slim model has of what a step of the masked one reads."""
    operand = node.inputs[0]
    name = "" if operand is None else operand.name or ""
    dims = program.typing.values.get(name, ((),))[0]
    if not any(touched(e, keep) for e in dims):
        return values
    chosen = mask(product(dims), keep).reshape(values.shape)
    return values[chosen].reshape([count(e, keep) for e in dims])


def _at_step(
    program: OnnxProgram,
    node: ir.Node,
    name: str,
    expected: NDArray[Any],
    found: NDArray[Any],
    tolerance: float,
) -> Difference:
    """The difference of an operand within the range that its step can tell apart."""
    step, low, high = _range(program, node, expected)
    both = [torch.from_numpy(np.clip(x, low, high)) for x in (expected, found)]
    scale = max(1.0, float(both[0].abs().max()) if expected.size else 1.0)
    bar = min(tolerance, max(step / 2 / scale, tolerance * _ARITHMETIC))
    (difference,) = compare([name], [both[0]], [both[1]], bar)
    if difference.problem is not None:
        where = f"{name}, which {node.op_type} quantises"
        return replace(difference, output=where)
    return difference


def _range(program: OnnxProgram, node: ir.Node, values: NDArray[Any]) -> tuple[float, float, float]:
    """The size of a step, and what is beyond the lowest and the highest integer.

    The step is infinite where it isn't known.
    """
    if node.op_type == "DynamicQuantizeLinear":
        span = max(float(values.max(initial=0)), 0.0) - min(float(values.min(initial=0)), 0.0)
        return span / 255, -np.inf, np.inf
    if node.op_type != "QuantizeLinear":
        return np.inf, -np.inf, np.inf
    scale, zero = (_constant(program, node, i) for i in (1, 2))
    result = program.known.get(node.outputs[0].name or "")
    if scale is None or result is None:
        return np.inf, -np.inf, np.inf
    step = float(scale.min())
    if scale.size != 1 or not result.dtype.is_integer():
        return step, -np.inf, np.inf
    at = float(zero.reshape(-1)[0]) if zero is not None else 0.0
    low, high = ((float(end) - at) * step for end in (result.dtype.min, result.dtype.max))
    # What is beyond is rounded to the ends, but only from half a step on.
    return step, low - step / 2, high + step / 2


def _constant(program: OnnxProgram, node: ir.Node, place: int) -> NDArray[Any] | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy().astype(np.float64)


def _run(
    model: ir.Model, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    register_libraries(options)
    wanted = list(dict.fromkeys(names))
    with temporary_file(model, "steps.onnx") as file:
        try:
            session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
            return dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
        except Exception as error:  # ONNX Runtime has a class of its own for every code
            raise VerifyError(
                "ONNX Runtime can't run the model without optimisations",
                why=" ".join(str(error).split())[:500],
            ) from error
