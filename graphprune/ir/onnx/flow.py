"""Layers of an ONNX graph: see `graphprune.analysis.blocks`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import takewhile

import onnx_ir as ir

from graphprune.analysis.blocks import Flow, find_blocks, positions
from graphprune.analysis.repeats import repeated_paths
from graphprune.axes import normal
from graphprune.ir.onnx.infer import captured, is_folded
from graphprune.ir.onnx.scopes import module_path
from graphprune.ir.onnx.shapes.sizes import Known
from graphprune.ops import Typing

# Operators that a residual path may lead through, by their first input.
_PASS = frozenset(
    "Identity Cast Dropout Relu Reshape LayerNormalization RMSNormalization "
    "SimplifiedLayerNormalization QuantizeLinear DequantizeLinear".split()
)
# The sum of the first two inputs, normalised.
_FUSED = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
# What the statistics of a norm are made of.
_STATISTICS = frozenset("Pow Mul Add Sub Div Sqrt Reciprocal Cast Identity Max Clip Abs".split())
_REDUCTIONS = frozenset("ReduceMean ReduceSum ReduceSumSquare ReduceL2".split())
_DEEPEST = 12  # operators from a norm's input to its divisor


def flow_of(model: ir.Model, known: Mapping[str, Known], typing: Typing) -> Flow:
    """What of a graph matters to its layers.

    Where no exporter has written down which operators belong together, residual blocks that
    follow one another and look alike make up a stack: "stack0" is the first of them.

    Args:
        model: as `read_onnx` gives it.
        known: what `known_values` found for it.
        typing: what `infer_onnx` found for it.
    """
    flow = _Graph(model.graph, known, typing).flow()
    if not find_blocks(flow, typing):
        products = {name for name, _ in typing.contractions}
        found = replace(flow, paths=repeated_paths(flow, products))
        if find_blocks(found, typing):
            return found
    return flow


class _Graph:
    def __init__(self, graph: ir.Graph, known: Mapping[str, Known], typing: Typing) -> None:
        self.graph = graph
        self.known = known
        self.typing = typing
        self.producers: dict[str, ir.Node] = {}
        self.inputs: dict[str, list[str]] = {}
        self.static = set(graph.initializers)  # computed from nothing but weights and constants
        for node in graph:
            given = [v.name or "" for v in (*node.inputs, *captured(node)) if v is not None]
            given = [n for n in dict.fromkeys(given) if n in self.static or not self._folded(n)]
            for value in node.outputs:
                name = value.name or ""
                if name and not self._folded(name):
                    self.producers[name] = node
                    self.inputs[name] = given
                    if all(n in self.static for n in given):
                        self.static.add(name)

    def flow(self) -> Flow:
        sums = {v: data for v in self.inputs if len(data := self._added(v)) > 1}
        ends = (v.name or "" for v in self.graph.outputs)
        weights = (n for n in self.graph.initializers if not self._folded(n))
        tensors = self.inputs.keys() | {v.name or "" for v in self.graph.inputs}
        sizes = {v for v in self.inputs if v in self.known and self.known[v].values is not None}
        written = {v: module_path(node) for v, node in self.producers.items()}
        flow = Flow(
            inputs=self.inputs,
            paths={v: path or "" for v, path in written.items()},
            outputs=frozenset(ends),
            parameters={name: name for name in weights},
            sums=sums,
            passes={**self._passes, **{v: n for v in self.inputs if (n := self._passed(v))}},
            tensors=tensors - sizes,
            sizes=sizes,
            alike=self._alike,
            named=False,
            operators={v: node.op_type for v, node in self.producers.items()},
        )
        return replace(flow, paths=_completed(flow, {v for v, p in written.items() if p is None}))

    def _alike(self, a: str, b: str) -> bool:
        x, y = self.typing.values.get(a), self.typing.values.get(b)
        if x is None or y is None or a not in self.known or b not in self.known:
            return False
        same_axes = [list(map(normal, d)) for d in x] == [list(map(normal, d)) for d in y]
        return same_axes and self.known[a].dtype == self.known[b].dtype

    def _names(self, value: str) -> list[str]:
        """The inputs of a value's operator by position, those that aren't there as ""."""
        return [v.name or "" if v is not None else "" for v in self.producers[value].inputs]

    def _added(self, value: str) -> list[str]:
        """What a sum adds, weights and constants aside; nothing for what is no sum."""
        node = self.producers[value]
        if node.op_type in _FUSED:
            results = [v.name for v in node.outputs]
            return self._names(value)[:2] if value in (*results[:1], *results[3:4]) else []
        if node.op_type not in ("Add", "Sum"):
            return []
        return [n for n in self._names(value) if not self._constant(n)]

    def _constant(self, name: str) -> bool:
        return name in self.static or self._folded(name)

    def _folded(self, name: str) -> bool:
        return is_folded(self.known.get(name))

    def _passed(self, value: str) -> str | None:
        """The input that runs through an operator which is a norm or the like."""
        node = self.producers[value]
        if node.op_type in _PASS and value == node.outputs[0].name:
            first = self._names(value)[0]
            return first if first in self.inputs or first not in self.static else None
        return None

    @cached_property
    def _passes(self) -> dict[str, str]:
        """What runs through norms that are written out: centred, scaled by a statistic, shifted."""
        passes: dict[str, str] = {}
        scaled: set[str] = set()
        for value, node in self.producers.items():
            names = self._names(value)
            if node.op_type not in ("Sub", "Div", "Mul", "Add") or len(names) != 2:
                continue
            for x, other in (names, names[::-1]):
                if x not in self.inputs and x in self.static:
                    continue
                source = passes.get(x, x)
                if self._constant(other):
                    done = node.op_type in ("Mul", "Add") and x in scaled
                else:
                    done = node.op_type != "Add" and self._reduces(other, {x, source}, _DEEPEST)
                if done:
                    passes[value] = x
                    if node.op_type != "Sub":
                        scaled.add(value)
                    break
                if node.op_type in ("Sub", "Div"):  # the second operand can't be what runs through
                    break
        return passes

    def _reduces(self, value: str, sources: set[str], depth: int) -> bool:
        """Whether a value is computed from means of `sources` and constants only."""
        if self._constant(value) or value not in self.producers or not depth:
            return False
        kind = self.producers[value].op_type
        given = [n for n in self.inputs[value] if not self._constant(n)]
        if kind in _REDUCTIONS:
            return all(self._made_of(n, sources, depth - 1) for n in given)
        return kind in _STATISTICS and all(self._reduces(n, sources, depth - 1) for n in given)

    def _made_of(self, value: str, sources: set[str], depth: int) -> bool:
        if value in sources:
            return True
        if value not in self.producers or not depth:
            return False
        given = [n for n in self.inputs[value] if not self._constant(n)]
        known = self.producers[value].op_type in _STATISTICS | _REDUCTIONS
        return known and bool(given) and all(self._made_of(n, sources, depth - 1) for n in given)


def _completed(flow: Flow, unknown: Collection[str]) -> dict[str, str]:
    """The paths of a graph, with those that follow from the neighbours of values without one.

    A sum, and a norm that nothing else reads the operand of, end a block and belong to what they
    are computed from. Everything else needs neighbours of one block on both sides.
    """
    paths, before = dict(flow.paths), dict(flow.paths)
    for value in flow.inputs if any(paths.values()) else ():
        if value not in unknown:
            continue
        given = [n for n in flow.inputs[value] if before.get(n)]
        source = flow.passes.get(value, "")
        if flow.users.get(source) == {value}:
            before[value] = paths[value] = paths.get(source, "")
        elif given:
            before[value] = before[max(given, key=flow.places.__getitem__)]
            paths[value] = before[value] if value in flow.sums else ""
    for value in reversed(list(flow.inputs)):
        if value in unknown and not paths[value]:
            after = _common(paths.get(u, "") for u in flow.users.get(value, ()))
            if [*positions(after)] and [*positions(after)] == [*positions(before[value])]:
                paths[value] = after
    return paths


def _common(paths: Iterable[str]) -> str:
    """The innermost module around some modules."""
    common: list[str] | None = None
    for path in paths:
        parts = path.split(".")
        same = takewhile(lambda pair: pair[0] == pair[1], zip(common or (), parts, strict=False))
        common = parts if common is None else [part for part, _ in same]
    return ".".join(common or [])
