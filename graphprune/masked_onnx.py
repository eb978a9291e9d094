"""The masked model as an ONNX graph: the dense one, with removed coordinates set to zero.

It is what a slim ONNX model has to equal, and nothing in it is cut. Behind every operator, removed
coordinates of its results are set to zero; operators that would notice the zeros get other
neutral elements, or are computed over the kept coordinates by formulas of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.analysis.onnx_infer import is_folded
from graphprune.analysis.onnx_sizes import Known, is_standard
from graphprune.axes import Dims, Keep, Ragged, atoms, mask, product, touched
from graphprune.errors import VerifyError
from graphprune.ops import Typing
from graphprune.ops.pointwise import wrap
from graphprune.rewrite.onnx_edit import Editor

# Types whose zero isn't 0: quantised values have a zero point, which their scale takes away.
_QUANTISED = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}


def mask_onnx(model: ir.Model, known: Mapping[str, Known], typing: Typing, keep: Keep) -> None:
    """Make the masked model of a model, in place, for inputs of the first example's sizes.

    Args:
        model: as `read_onnx` gives it.
        known: what `known_values` found for it.
        typing: what `infer_onnx` found for it.
        keep: masks of the pruned axes.

    Raises:
        VerifyError: an operator over a pruned axis has no formula.
    """
    _Masking(model, known, typing, keep).run()


class _Masking:
    def __init__(
        self, model: ir.Model, known: Mapping[str, Known], typing: Typing, keep: Keep
    ) -> None:
        self.graph = model.graph
        self.version = model.opset_imports.get("", 0)
        self.known = known
        self.typing = typing
        self.keep = keep
        self.ragged = any(isinstance(k, Ragged) for k in keep.values())
        self.editor = Editor(model.graph)
        self.masks: dict[tuple[Any, ...], ir.Value] = {}
        # What operators read in the dense graph; formulas before them change that.
        self.read: dict[ir.Node, list[str | None]] = {}

    def run(self) -> None:
        nodes = list(self.graph)
        self.read = {n: [None if v is None else v.name or "" for v in n.inputs] for n in nodes}
        for node in nodes:
            formula = FORMULAS.get(node.op_type) if is_standard(node) else None
            if formula is not None:
                formula(Call(node, self))
        for value in self.graph.initializers.values():
            self._zero(value)
        for node in nodes:
            for value in node.outputs:
                if not is_folded(self.known.get(value.name or "")):
                    self._zero_behind(value, node)

    def dims(self, value: ir.Value | None) -> Dims:
        """Axes of a value."""
        return () if value is None else self.typing.values.get(value.name or "", ((),))[0]

    def kept(self, dims: Dims) -> NDArray[np.bool_] | None:
        """The mask of a tensor, which broadcasts to its shape; None where everything stays."""
        if not any(touched(e, self.keep) for e in dims):
            return None
        if self.ragged:
            around = {a for e in dims for a in atoms(e) if a in self.keep}
            if any(isinstance(self.keep[a], Ragged) for a in around):
                whole = mask(product(dims), self.keep)
                return whole.reshape([e.size for e in dims])
        result = np.ones([1] * len(dims), dtype=bool)
        for i, e in enumerate(dims):
            if touched(e, self.keep):
                shape = [1] * len(dims)
                shape[i] = e.size
                result = result & mask(e, self.keep).reshape(shape)
        return result

    def mask_value(self, dims: Dims) -> ir.Value | None:
        """The mask as a constant of the graph."""
        key = tuple(map(id, dims))
        if key not in self.masks:
            kept = self.kept(dims)
            if kept is None:
                return None
            self.masks[key] = self.editor.constant(kept, "graphprune_mask")
        return self.masks[key]

    def _zero(self, value: ir.Value) -> None:
        """Removed coordinates of an initialiser."""
        kept = self.kept(self.dims(value))
        tensor = value.const_value
        if kept is None or tensor is None or tensor.dtype in _QUANTISED:
            return
        dtype, name = tensor.dtype, value.name

        def masked() -> ir.TensorProtocol:
            whole = np.where(kept, tensor.numpy(), np.zeros((), dtype.numpy()))
            return ir.Tensor(whole, dtype=dtype, name=name)

        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.LazyTensor(masked, dtype=dtype, shape=shape, name=name)

    def _zero_behind(self, value: ir.Value, node: ir.Node) -> None:
        """Removed coordinates of a result."""
        found = self.known.get(value.name or "")
        if found is None or found.dtype in _QUANTISED or not value.uses():
            return
        chosen = self.mask_value(self.dims(value))
        if chosen is None:
            return
        uses = list(value.uses())
        base = f"{value.name}_masked"
        if found.dtype == ir.DataType.BOOL:
            clean = self.editor.after(node, "And", [chosen, value], base=base)
        else:
            zero = self.editor.constant(np.zeros((), found.dtype.numpy()), "graphprune_zero")
            clean = self.editor.after(node, "Where", [chosen, value, zero], base=base)
        for use in uses:
            use.node.replace_input_with(use.idx, clean)


class Call:
    """An operator over a pruned axis, as its formula sees it."""

    def __init__(self, node: ir.Node, masking: _Masking) -> None:
        self.node = node
        self.masking = masking
        self.editor = masking.editor
        self.x = node.inputs[0]
        self._read = masking.read[node]
        self.dims = masking.typing.values.get(self._read[0] or "", ((),))[0]

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def axes(self, position: int = 1) -> list[int]:
        """The reduced dimensions, from attribute or input."""
        name = self._read[position] if position < len(self._read) else None
        found = None if name is None else self.masking.known[name].constant
        given = self.get("axes", None) if found is None else found.reshape(-1)
        if given is None or not len(given):
            noop = self.get("noop_with_empty_axes", 0)
            return [] if noop else list(range(len(self.dims)))
        return sorted(wrap(int(a), len(self.dims)) for a in given)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the first input's elements."""
        return self.masking.known[self._read[0] or ""].dtype.numpy()

    def touched(self, axes: Sequence[int]) -> bool:
        """Whether one of the dimensions loses places."""
        return any(touched(self.dims[i], self.masking.keep) for i in axes)

    @property
    def limits(self) -> tuple[Any, Any]:
        """The lowest and the highest number of the first input's type."""
        dtype = self.masking.known[self._read[0] or ""].dtype
        return (False, True) if dtype == ir.DataType.BOOL else (dtype.min, dtype.max)

    def neutral(self, value: Any) -> None:
        """Put another number than zero at the removed coordinates of the first input."""
        dtype = self.dtype
        number = self.editor.constant(np.asarray(value, dtype=dtype), "graphprune_neutral")
        chosen = self.masking.mask_value(self.dims)
        changed = self.editor.before(self.node, "Where", [chosen, self.x, number])
        self.node.replace_input_with(0, changed)

    def counts(self, axes: Sequence[int]) -> NDArray[np.int64]:
        """How many places are kept along some dimensions, which have size 1 in the result."""
        kept = self.masking.kept(self.dims)
        shape = [e.size if i in axes else 1 for i, e in enumerate(self.dims)]
        whole = np.ones(1, bool) if kept is None else kept
        whole = np.broadcast_to(whole, np.broadcast_shapes(whole.shape, tuple(shape)))
        counts: NDArray[np.int64] = np.maximum(whole.sum(axis=tuple(axes), keepdims=True), 1)
        return counts

    def number(self, values: NDArray[Any] | float) -> ir.Value:
        """A constant of the type of the first input."""
        return self.editor.constant(np.asarray(values, dtype=self.dtype), "graphprune_number")

    def sum(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The sum over some dimensions, which stay with size 1."""
        if self.masking.version < 13:
            return self.editor.before(self.node, "ReduceSum", [x], {"axes": list(axes)})
        places = self.editor.constant(np.asarray(axes, dtype=np.int64), "graphprune_axes")
        return self.editor.before(self.node, "ReduceSum", [x, places])

    def normalised(
        self,
        x: ir.Value,
        chosen: ir.Value | None,
        axes: Sequence[int],
        counts: NDArray[np.int64],
        *,
        centred: bool,
    ) -> ir.Value:
        """`x` by its statistics over the kept coordinates along `axes`; zeros stay zeros."""
        number = self.number(counts)
        if centred:
            mean = self.make("Div", self.sum(x, axes), number)
            x = self.make("Where", chosen, self.make("Sub", x, mean), self.number(0.0))
        square = self.make("Div", self.sum(self.make("Mul", x, x), axes), number)
        epsilon = self.number(float(self.get("epsilon", 1e-5)))
        return self.make("Div", x, self.make("Sqrt", self.make("Add", square, epsilon)))

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`x` in another shape."""
        sizes = self.editor.constant(np.asarray(shape, dtype=np.int64), "graphprune_shape")
        return self.make("Reshape", x, sizes)

    def read(self, position: int) -> str:
        """The name of an input in the dense graph."""
        return self._read[position] or ""

    def make(self, op_type: str, *inputs: ir.Value | None) -> ir.Value:
        """An operator before this one."""
        return self.editor.before(self.node, op_type, list(inputs))

    def replace(self, value: ir.Value) -> None:
        """Let `value` take the place of the operator's first result."""
        if any(v.uses() for v in self.node.outputs[1:]):
            raise VerifyError(
                f"statistics of {self.node.op_type} over a pruned axis are read",
                where=self.node.name,
            )
        result = self.node.outputs[0]
        chosen = self.masking.mask_value(self.masking.dims(result))
        if chosen is not None:
            value = self.make("Where", chosen, value, self.number(0.0))
        result.replace_all_uses_with(value)


Formula: TypeAlias = "Callable[[Call], None]"
FORMULAS: dict[str, Formula] = {}


def _formula(*names: str) -> Callable[[Formula], Formula]:
    def register(formula: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(names, formula))
        return formula

    return register


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
