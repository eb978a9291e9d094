"""Setting removed coordinates of an ONNX graph to zero, and what formulas see of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.analysis.structure import Block
from graphprune.axes import Dims, Keep, Ragged, atoms, mask, product, touched
from graphprune.errors import VerifyError
from graphprune.ir.onnx.edit import Editor
from graphprune.ir.onnx.infer import is_folded
from graphprune.ir.onnx.shapes.sizes import Known, registered_name
from graphprune.ir.onnx.tensors import Streamed
from graphprune.ops import Typing, find_op
from graphprune.ops.families.pointwise import wrap
from graphprune.oracle.masked_quantised import Zeros


class Masking:
    """A graph on its way to its masked model."""

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
        self.zeros = Zeros(model.graph)
        self.masks: dict[tuple[Any, ...], ir.Value] = {}
        # What operators read in the dense graph; formulas before them change that.
        self.read: dict[ir.Node, list[str | None]] = {}

    def run(self, cuts: Iterable[Block]) -> None:
        """Mask the graph in place.

        Args:
            cuts: removed layers, those of a stack in order.
        """
        nodes = list(self.graph)
        self.read = {n: [None if v is None else v.name or "" for v in n.inputs] for n in nodes}
        self._stand_in(cuts)
        for node in nodes:
            formula = find_op(registered_name(node)).masked
            if formula is not None and self._is_typed(node):
                formula(Call(node, self))
        for value in self.graph.initializers.values():
            self._zero(value)
        for node in nodes:
            for value in node.outputs:
                if not is_folded(self.known.get(value.name or "")):
                    self._zero_behind(value, node)

    def _is_typed(self, node: ir.Node) -> bool:
        """Whether all that an operator reads has axes; otherwise they are frozen."""
        return all(name is None or name in self.typing.values for name in self.read[node])

    def _stand_in(self, cuts: Iterable[Block]) -> None:
        """Behind a removed layer everything reads a copy of what the layer read; it runs idle."""
        values = {v.name or "": v for v in (*self.graph.inputs, *self.graph.initializers.values())}
        values |= {v.name or "": v for node in self.graph for v in node.outputs}
        for block in cuts:
            result = values[block.exit]
            node = result.producer()
            assert node is not None  # a layer computes it
            copy = self.editor.after(node, "Identity", [values[block.entry]])
            copy.type, copy.shape = result.type, result.shape
            result.replace_all_uses_with(copy, replace_graph_outputs=True)
            if copy.is_graph_output():
                result.name, copy.name = copy.name, result.name
            values[block.exit] = copy

    def dims(self, value: ir.Value | None) -> Dims:
        """Axes of a value."""
        return () if value is None else self.typing.values.get(value.name or "", ((),))[0]

    def kept(self, dims: Dims) -> NDArray[np.bool_] | None:
        """The mask of a tensor, which broadcasts to its shape; None where everything stays."""
        factors = self._factors(dims)
        if not factors:
            return None
        result = np.ones([1] * len(dims), dtype=bool)
        for factor in factors:
            result = result & factor
        return result

    def _factors(self, dims: Dims) -> list[NDArray[np.bool_]]:
        """Masks that broadcast to a tensor's shape; what all of them keep stays."""
        changed = [i for i, e in enumerate(dims) if touched(e, self.keep)]
        if self.ragged and changed:
            around = {a for e in dims for a in atoms(e) if a in self.keep}
            if any(isinstance(self.keep[a], Ragged) for a in around):
                return [mask(product(dims), self.keep).reshape([e.size for e in dims])]
        return [
            mask(dims[i], self.keep).reshape([-1 if j == i else 1 for j in range(len(dims))])
            for i in changed
        ]

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
        factors = self._factors(self.dims(value))
        tensor = value.const_value
        if not factors or tensor is None:
            return
        zeros = self.zeros.stored(value.name or "", tensor)
        if zeros is None:
            return

        def masked(elements: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
            rows = elements[start:stop]
            for factor in factors:
                chosen = factor if len(factor) == 1 else factor[start:stop]
                rows = np.where(chosen, rows, zeros[start:stop])
            return rows

        value.const_value = Streamed(tensor, masked, tensor.shape.numpy(), value.name)

    def _zero_behind(self, value: ir.Value, node: ir.Node) -> None:
        """Removed coordinates of a result."""
        found = self.known.get(value.name or "")
        if found is None or not value.uses():
            return
        zero = self.zeros.of(value.name or "", found.dtype)
        if zero is None:
            return
        chosen = self.mask_value(self.dims(value))
        if chosen is None:
            return
        uses = list(value.uses())
        base = f"{value.name}_masked"
        if found.dtype == ir.DataType.BOOL:
            clean = self.editor.after(node, "And", [chosen, value], base=base)
        else:
            if not isinstance(zero, ir.Value):
                zero = self.editor.constant(zero, "graphprune_zero")
            clean = self.editor.after(node, "Where", [chosen, value, zero], base=base)
        for use in uses:
            use.node.replace_input_with(use.idx, clean)


class Call:
    """An operator over a pruned axis, as its formula sees it."""

    def __init__(self, node: ir.Node, masking: Masking) -> None:
        self.node = node
        self.masking = masking
        self.editor = masking.editor
        self.x = node.inputs[0]
        self._read = masking.read[node]
        self._subject = self._read[0] or ""
        self.dims = masking.typing.values.get(self._subject, ((),))[0]

    def about(self, name: str) -> None:
        """Let `dims` and the type be those of another value of the dense graph."""
        self._subject = name
        self.dims = self.masking.typing.values.get(name, ((),))[0]

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
        """The type of the elements of the first input, or of what `about` named."""
        return self.masking.known[self._subject].dtype.numpy()

    def touched(self, axes: Sequence[int]) -> bool:
        """Whether one of the dimensions loses places."""
        return any(touched(self.dims[i], self.masking.keep) for i in axes)

    @property
    def limits(self) -> tuple[Any, Any]:
        """The lowest and the highest number of the first input's type."""
        dtype = self.masking.known[self._subject].dtype
        return (False, True) if dtype == ir.DataType.BOOL else (dtype.min, dtype.max)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which coordinates of the first input stay, at its full size."""
        kept = self.masking.kept(self.dims)
        whole = np.ones(1, dtype=bool) if kept is None else kept
        return np.broadcast_to(whole, [e.size for e in self.dims])

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
