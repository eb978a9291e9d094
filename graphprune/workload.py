"""The input that multiply-accumulates and latencies are of, the same wherever they are stated.

It is one sample: a batch of one where the model leaves the batch open, 128 tokens (or what the
model can take, if that is less) where it leaves their number open, and otherwise the sizes that the
model has fixed or was traced with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils import _pytree as pytree

from graphprune.analysis.onnx_sizes import Known, shapes_at
from graphprune.analysis.sizes import ExampleSizes
from graphprune.axes import Atom, Dims, Product, normal
from graphprune.errors import LoadError
from graphprune.inputs import Input, inputs_of, is_causal
from graphprune.masked import flat_inputs, input_names
from graphprune.onnx_program import OnnxProgram
from graphprune.program import BaseProgram, Program
from graphprune.streaming.data import default_window

LENGTH = 128
"""Tokens, and other open sizes of ONNX files."""

_ALWAYS = 2  # torch.export takes it that an open size is at least this, and runs with one as well

Shapes = Mapping[str, tuple[int, ...]]
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """Sizes of one call of a model.

    Attributes:
        shapes: input name to its shape.
        tokens: whether all inputs are matrices of token ids, masks and the like.
    """

    shapes: Shapes
    tokens: bool = False

    def __str__(self) -> str:
        """Name the sizes: "1 x 128 tokens", "1 x 3 x 224 x 224"; what is several inputs by name."""
        sizes = {" x ".join(map(str, shape)): name for name, shape in self.shapes.items()}
        if len(sizes) == 1:
            return f"{next(iter(sizes))} tokens" if self.tokens else next(iter(sizes))
        named = (f"{name} {' x '.join(map(str, s))}" for name, s in self.shapes.items())
        return ", ".join(named)


def workload_of(program: BaseProgram, length: int | None = None) -> Workload:
    """The input that a program's multiply-accumulates are counted for.

    Args:
        program: it.
        length: tokens, and other open sizes of an ONNX file; None for 128. A model that can't
            take so many gets what it can.
    """
    if isinstance(program, OnnxProgram):
        return _of_onnx(program, LENGTH if length is None else length)
    assert isinstance(program, Program)
    found = inputs_of(program)
    usual = _Symbols(program, LENGTH if length is None else length)
    shapes = {i.name: usual.shape(i) for i in found}
    workload = Workload(shapes, bool(found) and all(i.is_tokens for i in found))
    return workload if _is_taken(program, workload) else usual.traced(found)


def traced_workload(program: BaseProgram) -> Workload:
    """The input that a program was traced with, or the first example of an ONNX file."""
    if isinstance(program, OnnxProgram):
        shapes = {name: program.known[name].shapes[0] for name in program.workload.shapes}
        return Workload(shapes, program.workload.tokens)
    assert isinstance(program, Program)
    return _Symbols(program, LENGTH).traced(inputs_of(program))


def sizes_at(program: BaseProgram, workload: Workload) -> dict[Atom, int]:
    """Sizes of the axes that have others in a call than in the program's example."""
    shapes: Mapping[str, Sequence[Sequence[int]]]
    if isinstance(program, OnnxProgram):
        shapes = {name: (k.shapes[0],) for name, k in known_at(program, workload).items()}
    else:
        assert isinstance(program, Program)
        shapes = _value_shapes(program, workload)
    return dict(_resized(program.typing.values, shapes))


def known_at(program: OnnxProgram, workload: Workload) -> Mapping[str, Known]:
    """What is known about the values of an ONNX graph in a call of these sizes.

    Raises:
        LoadError: the model doesn't take them.
    """
    if all(program.known[n].shapes[0] == shape for n, shape in workload.shapes.items()):
        return program.known
    return shapes_at(program.model, workload.shapes)


def example_at(program: Program, workload: Workload) -> Example:
    """The example inputs of a program, repeated or cut to the sizes of a call."""
    names = input_names(program.exported)
    leaves = flat_inputs(program.exported, program.example)
    sized = [
        _stretched(leaf, workload.shapes[name]) if name in workload.shapes else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    layout = program.exported.call_spec.in_spec
    if layout is None:
        return tuple(sized), {}
    args, kwargs = pytree.tree_unflatten(sized, layout)
    return args, kwargs


def feeds_at(program: OnnxProgram, workload: Workload) -> dict[str, Any]:
    """Random inputs of an ONNX model of the sizes of a call."""
    from graphprune.verification_onnx import random_feeds

    return random_feeds(replace(program, known=dict(known_at(program, workload))))


class _Symbols:
    """Sizes that a torch program leaves open."""

    def __init__(self, program: Program, length: int) -> None:
        self.program = program
        self.example = ExampleSizes(program.exported)
        # Elsewhere the example is the user's own, and its length means something.
        ours = program.source is not None or is_causal(program)
        self.length = min(length, default_window(program)) if ours else None
        self.values: dict[Any, int] = {}
        self.dims = {
            n.name: tuple(n.meta["val"].shape)
            for n in program.exported.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
        }
        for one in inputs_of(program):
            for dim, size in enumerate(self.dims[one.name]):
                self._settle(one, dim, size)

    def shape(self, one: Input) -> tuple[int, ...]:
        """Sizes of an input."""
        return tuple(self._size(size) for size in self.dims[one.name])

    def traced(self, inputs: Sequence[Input]) -> Workload:
        """The sizes of the example."""
        shapes = {
            i.name: tuple(self.example.size(size).size for size in self.dims[i.name])
            for i in inputs
        }
        return Workload(shapes, bool(inputs) and all(i.is_tokens for i in inputs))

    def _settle(self, one: Input, dim: int, size: Any) -> None:
        """Decide on the symbol of a dimension, once."""
        expr = None if isinstance(size, int) else size.node.expr
        if expr is None or len(expr.free_symbols) != 1:
            return
        (symbol,) = expr.free_symbols
        if symbol in self.values:
            return
        wanted = 1 if dim == 0 else self.length if one.is_tokens and dim == 1 else None
        if wanted is None:
            return
        factor = int(expr.as_coeff_Mul()[0]) if expr.as_coeff_Mul()[0].is_Integer else 1
        self.values[symbol] = self._allowed(symbol, max(1, wanted // factor))

    def _allowed(self, symbol: Any, wanted: int) -> int:
        """The number nearest to `wanted` that the trace allows."""
        bounds = self.program.exported.range_constraints.get(symbol)
        low, high = getattr(bounds, "lower", None), getattr(bounds, "upper", None)
        if isinstance(low, sympy.Integer) and low > _ALWAYS:
            wanted = max(wanted, int(low))
        return min(wanted, int(high)) if isinstance(high, sympy.Integer) else wanted

    def _size(self, size: Any) -> int:
        if isinstance(size, int) or not size.node.expr.free_symbols <= self.values.keys():
            return self.example.size(size).size
        return int(size.node.expr.subs(self.values))


def _of_onnx(program: OnnxProgram, length: int) -> Workload:
    found = inputs_of(program)
    tokens = bool(found) and all(i.is_tokens for i in found)
    example = {i.name: program.known[i.name].shapes[0] for i in found}
    for other in (length, None):
        shapes = _open_sizes(program, example, other)
        try:
            known_at(program, Workload(shapes))
        except LoadError:
            continue
        return Workload(shapes, tokens)
    return Workload(example, tokens)


def _open_sizes(program: OnnxProgram, example: Shapes, length: int | None) -> Shapes:
    """A batch of one, and `length` (or the example's sizes) along what else is open."""
    named: dict[str, int] = {}
    result = {}
    for value in program.model.graph.inputs:
        name = value.name or ""
        if name not in example:
            continue
        shape = []
        for i, size in enumerate(program.known[name].sizes):
            wanted = size.size
            if size.dynamic:
                wanted = 1 if i == 0 else size.size if length is None else length
                symbol = getattr(value.shape[i], "value", None) if value.shape is not None else None
                if symbol:  # names stand for one size, and sums of names for the sum
                    wanted = sum(named.setdefault(n, wanted) for n in symbol.split(" + "))
            shape.append(wanted)
        result[name] = tuple(shape)
    return result


def _value_shapes(program: Program, workload: Workload) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all values of a graph in a call."""
    sizes = ExampleSizes(program.exported, workload.shapes)
    result = {}
    for node in program.exported.graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else (value,)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        if any(not isinstance(s, int) for t in tensors for s in t.shape):
            result[node.name] = [tuple(sizes.size(s).size for s in t.shape) for t in tensors]
    return result


def _is_taken(program: Program, workload: Workload) -> bool:
    """Whether all sizes that follow from those of a call make sense."""
    try:
        found = _value_shapes(program, workload)
    except (ArithmeticError, TypeError, ValueError):  # such as a division by a batch less one
        return False
    return all(size >= 0 for shapes in found.values() for shape in shapes for size in shape)


def _resized(
    values: Mapping[str, Sequence[Dims]], shapes: Mapping[str, Sequence[Sequence[int]]]
) -> Iterator[tuple[Atom, int]]:
    """Axes and the sizes that they have, where these are others."""
    found: dict[Atom, int] = {}
    merged = []
    for name, several in values.items():
        for dims, shape in zip(several, shapes.get(name, ()), strict=False):
            for d, size in zip(dims, shape, strict=False):
                e = normal(d)
                if isinstance(e, Atom) and e.size != size:
                    found[e] = size
                elif isinstance(e, Product) and e.size != size:
                    merged.append((e, size))
    for e, size in merged:  # an open size that stands nowhere alone
        left = [a for a in e.factors if isinstance(a, Atom) and a not in found and a.frozen]
        rest = math.prod(found.get(f, f.size) if isinstance(f, Atom) else f.size for f in e.factors)
        if len(left) == 1 and rest != size:
            found[left[0]] = size * left[0].size // rest
    yield from found.items()


def _stretched(value: Any, shape: Sequence[int]) -> Any:
    """A tensor of this shape, with the values of another over and over."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) == tuple(shape):
        return value
    times = [-(-new // old) for new, old in zip(shape, value.shape, strict=True)]
    return value.repeat(times)[tuple(slice(new) for new in shape)]
