"""Cutting the tensors of an ONNX graph, and what size rules see of an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.axes import Dims, Expr, Keep, Ragged, atoms, count, indices, mask, normal, touched
from graphprune.errors import EmitError
from graphprune.ir.onnx.edit import Editor, set_attribute, set_input
from graphprune.ir.onnx.infer import is_folded
from graphprune.ir.onnx.shapes.sizes import Known, registered_name
from graphprune.ir.onnx.tensors import Streamed
from graphprune.ops import Typing, find_op
from graphprune.rewrite.onnx_header import drop_stale


class Rewriter:
    """A graph on its way to its slim form."""

    def __init__(
        self, model: ir.Model, known: Mapping[str, Known], typing: Typing, keep: Keep
    ) -> None:
        self.graph = model.graph
        self.version = model.opset_imports.get("", 0)
        self.known = dict(known)  # both grow by what is folded
        self.values = dict(typing.values)
        self.keep = keep
        self.editor = Editor(model.graph)

    def run(self) -> None:
        """Cut the graph in place."""
        self._fold()
        for name, value in list(self.graph.initializers.items()):
            self._cut(name, value)
        for node in list(self.graph):
            rule = find_op(registered_name(node)).sizes
            if rule is not None and self._concerned(node):
                rule(Call(node, self))
        _forget_shapes(self.graph, self.known)
        drop_stale(self.graph, self._is_cut)

    def _fold(self) -> None:
        outputs = set(self.graph.outputs)
        for node in list(self.graph):
            for value in node.outputs:
                found = self.known.get(value.name or "")
                if found is None or value in outputs or not is_folded(found):
                    continue
                constant = found.constant
                if constant is None or not value.uses():
                    continue
                new = self.editor.constant(constant, f"{value.name}_folded")
                self.values[new.name or ""] = self.values[value.name or ""]
                self.known[new.name or ""] = found
                value.replace_all_uses_with(new)

    def _cut(self, name: str, value: ir.Value) -> None:
        """Put a cut tensor in place of an initialiser."""
        dims = self.values.get(name, ((),))[0]
        tensor = value.const_value
        if tensor is None or not any(touched(e, self.keep) for e in dims):
            return
        kept = [indices(e, self.keep) if touched(e, self.keep) else None for e in dims]

        def cut(elements: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
            first, *others = kept
            result = elements[slice(start, stop) if first is None else first[start:stop]]
            for axis, places in enumerate(others, start=1):
                if places is not None:
                    result = np.take(result, places, axis=axis)
            return result

        shape = [e.size if k is None else len(k) for e, k in zip(dims, kept, strict=True)]
        value.const_value = Streamed(tensor, cut, shape, name)
        value.shape = ir.Shape(shape)

    def _concerned(self, node: ir.Node) -> bool:
        names = [v.name for v in (*node.inputs, *node.outputs) if v is not None]
        return any(self._is_cut(name or "") for name in names)

    def _is_cut(self, name: str) -> bool:
        return any(touched(e, self.keep) for dims in self.values.get(name, ()) for e in dims)


class Call:
    """A node whose sizes change, as a size rule sees it."""

    def __init__(self, node: ir.Node, rewriter: Rewriter) -> None:
        self.node = node
        self._rewriter = rewriter
        self.editor = rewriter.editor
        self.version = rewriter.version

    def dims(self, position: int) -> Dims:
        """Axes of an input; empty where it isn't there."""
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        return () if value is None else self._axes(value)

    @property
    def results(self) -> list[Dims]:
        """Axes of all results."""
        return [self._axes(v) for v in self.node.outputs]

    def _axes(self, value: ir.Value) -> Dims:
        return self._rewriter.values.get(value.name or "", ((),))[0]

    def touched(self, e: Expr) -> bool:
        """Whether an axis loses places."""
        return touched(e, self._rewriter.keep)

    def kept(self, e: Expr) -> int:
        """How many places of an axis stay."""
        return count(e, self._rewriter.keep)

    def before(self, e: Expr, place: int) -> int:
        """How many places of an axis stay before one of them."""
        return int(self.mask(e)[:place].sum())

    def mask(self, e: Expr) -> NDArray[np.bool_]:
        """Which places of an axis stay.

        Where that differs between the places of an axis in another dimension, those of its first
        one; boundaries are at the same places for all.
        """
        around = set(atoms(e))
        keep = dict(self._rewriter.keep)
        for atom, kept in self._rewriter.keep.items():
            if isinstance(kept, Ragged) and kept.outer not in around:
                keep[atom] = kept.mask[0]
        return mask(e, keep)

    def constant(self, position: int) -> NDArray[Any] | None:
        """The elements of an input that is constant."""
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        found = None if value is None else self._rewriter.known.get(value.name or "")
        return None if found is None else found.constant

    def integers(self, name: str, position: int) -> list[int]:
        """Integers that are an attribute in some opsets and an input in others."""
        given = self.constant(position)
        if given is not None:
            return [int(i) for i in given.reshape(-1)]
        attribute = self.node.attributes.get(name)
        return [] if attribute is None else list(attribute.as_ints())

    def set_attribute(self, name: str, value: int | float | Sequence[int]) -> None:
        """Write an attribute."""
        set_attribute(self.node, name, value)

    def write(
        self, name: str, position: int, values: Sequence[int] | NDArray[Any], since: int = 0
    ) -> None:
        """Write such integers where this node has them; `since` an opset they are an input."""
        if self.version < since:
            self.set_attribute(name, list(values))
            return
        old = self.node.inputs[position] if position < len(self.node.inputs) else None
        found = None if old is None else self._rewriter.known.get(old.name or "")
        dtype = np.dtype(np.int64) if found is None else found.dtype.numpy()
        new = self.editor.constant(
            np.asarray(values, dtype=dtype), f"{self.node.outputs[0].name}_{name}"
        )
        set_input(self.node, position, new)

    def shape(self, position: int, places: Sequence[int] | None = None) -> None:
        """Write sizes of the first result to the input that holds them.

        Args:
            position: the input.
            places: the dimensions whose sizes it holds; None for the last ones, one an element.
        """
        old = self.node.inputs[position] if position < len(self.node.inputs) else None
        if old is None:
            return
        known = self._rewriter.known
        whole = known[self.node.outputs[0].name or ""].sizes
        if places is None:  # an expansion may leave out the first ones
            places = range(len(whole) - known[old.name or ""].shapes[0][0], len(whole))
        dims, sizes = [self.results[0][i] for i in places], [whole[i] for i in places]
        given = self.constant(position)
        now = known[old.name or ""].values if given is None else None
        parts: list[int | None] = []
        for i, (e, size) in enumerate(zip(dims, sizes, strict=True)):
            if not size.dynamic:
                parts.append(self.kept(e))
            elif given is not None and not self.touched(e):
                parts.append(int(given[i]))
            elif now is not None and int(now[0][i]) == -1:
                parts.append(-1)
            else:
                parts.append(None)  # as it was
        if self.node.op_type == "Reshape":
            self._copy_sizes(parts, dims)
        scaled = [i for i, e in enumerate(dims) if parts[i] is None and self.touched(e)]
        if -1 not in parts and scaled and self.node.op_type == "Reshape":
            parts[scaled.pop()] = -1
        set_input(self.node, position, self._joined(parts, old, dims, scaled))

    def _copy_sizes(self, parts: list[int | None], dims: Sequence[Expr]) -> None:
        """Where nothing else is computed, let a Reshape take open sizes from its operand, by 0.

        Optimisers recognise attention by such shapes, and by few others.
        """
        x = self.node.inputs[0]
        sizes = self._rewriter.known[x.name or ""].sizes if x is not None else ()
        opened = [size.size for size in sizes if size.dynamic]
        places = [i for i, part in enumerate(parts) if part is None]
        for i in places:
            if i >= len(sizes) or not sizes[i].dynamic or self.touched(dims[i]):
                return
            # Of two that are equal in the examples, nobody knows which is which.
            if opened.count(sizes[i].size) > 1 or normal(self.dims(0)[i]) != normal(dims[i]):
                return
        for i in places:
            parts[i] = 0
            self.node.attributes.pop("allowzero", None)

    def _joined(
        self,
        parts: list[int | None],
        old: ir.Value,
        dims: Sequence[Expr],
        scaled: Sequence[int],
    ) -> ir.Value:
        """A shape of numbers, and of elements of the old one, some of them in proportion."""
        base = f"{self.node.outputs[0].name}_shape"
        if None not in parts:
            return self.editor.constant(np.asarray(parts, dtype=np.int64), base)
        pieces = []
        for i, part in enumerate(parts):
            piece = self._number(i if part is None else part, base)
            if part is None:
                piece = self.editor.before(self.node, "Gather", [old, piece], {"axis": 0}, base)
            if i in scaled:
                piece = self._in_proportion(piece, dims[i], old, base)
            pieces.append(piece)
        return self.editor.before(self.node, "Concat", pieces, {"axis": 0}, base)

    def _in_proportion(self, piece: ir.Value, e: Expr, old: ir.Value, base: str) -> ir.Value:
        if self._measures_what_is_cut(old):
            raise EmitError(
                "a size is computed from sizes that change, and can't be put right",
                where=f"{self.node.op_type} {self.node.name}",
                hint="leave one of the structures in it out of the plan",
            )
        size = Fraction(self.kept(e), e.size)
        for op_type, number in (("Mul", size.numerator), ("Div", size.denominator)):
            piece = self.editor.before(
                self.node, op_type, [piece, self._number(number, base)], base=base
            )
        return piece

    def _number(self, number: int, base: str) -> ir.Value:
        return self.editor.constant(np.asarray([number], dtype=np.int64), base)

    def _measures_what_is_cut(self, value: ir.Value) -> bool:
        """Whether a value is computed from the shape of a tensor that is cut."""
        waiting, seen = [value], set()
        while waiting:
            node = waiting.pop().producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            inputs = [v for v in node.inputs if v is not None]
            if node.op_type not in ("Shape", "Size"):
                waiting.extend(inputs)
            elif any(self.touched(e) for v in inputs for e in self._axes(v)):
                return True
        return False


SizeRule: TypeAlias = "Callable[[Call], None]"


def _forget_shapes(graph: ir.Graph, known: Mapping[str, Known]) -> None:
    """Shapes of inner values are stale; those of inputs and outputs never change."""
    outputs = set(graph.outputs)
    for value in outputs:
        found = known.get(value.name or "")
        if found and value.shape is not None and len(value.shape) != len(found.sizes):
            sizes = [None if s.dynamic else s.size for s in found.sizes]
            value.shape = ir.Shape(sizes)  # the source has a wrong one
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
