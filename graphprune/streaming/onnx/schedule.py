"""The order of a streamed run over an ONNX graph: segments, probes, how long each value lives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphprune.ir.onnx.infer import captured
from graphprune.streaming.core.schedule import Schedule
from graphprune.streaming.core.sites import Group
from graphprune.streaming.onnx.products import trains

_RANDOM = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli".split()
)
_MEASURING = frozenset(("Shape", "Size"))


@dataclass(frozen=True, slots=True)
class Segment:
    """The operators between two barriers.

    Attributes:
        nodes: in order.
        inputs: values from before, those of the model's inputs among them.
        outputs: values that probes or later segments read.
        weights: the initialisers that are read.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


class OnnxSchedule(Schedule):
    """When everything happens in an ONNX graph; see `Schedule`.

    What is computed from nothing but initialisers, such as a weight that is transposed, is
    computed anew in every segment that reads it: the weight may have changed.

    Attributes:
        nodes: all operators, in order.
        constant: the values that are the same for all samples of the same sizes.
    """

    def __init__(
        self,
        graph: ir.Graph,
        groups: Iterable[Group],
        shared: Collection[str] = (),
        others: Mapping[str, str] | None = None,
    ) -> None:
        """The schedule of a graph for some groups.

        Args:
            graph: the graph.
            groups: what is treated.
            shared: inputs of the model that are equal in all samples of the same sizes.
            others: name of a product to that of the value that it is added to; None where no probe
                looks at these.
        """
        self._weights = frozenset(graph.initializers)
        self.nodes: list[ir.Node] = list(graph)
        places = {v.name or "": i for i, n in enumerate(self.nodes) for v in n.outputs}
        super().__init__(groups, places, others)
        self.inputs = tuple(v.name or "" for v in graph.inputs)
        self._reads = [self._read(node) for node in self.nodes]
        self._free = self._computed_from_weights()
        self.needed = self._needed()
        self.constant = self._constant(shared)
        waiting = (v.name or "" for place in self.needed for v in self.nodes[place].outputs)
        self.uses = self.last_uses(
            (name for name in waiting if name and name not in self._free),
            ((place, self._reads[place]) for place in self.needed),
        )

    def reads(self, value: str) -> list[str]:
        """The values that the operator behind a value reads; none for an input of the model."""
        return self._reads[self.places[value]] if value in self.places else []

    def segment(self, start: int, end: int, wanted: Iterable[str] | None = None) -> Segment:
        """The segment between two barriers.

        Args:
            start: place of the first barrier.
            end: place of the second.
            wanted: the outputs; None for what probes and later segments read.
        """
        before = self.held(start) | set(self.inputs)
        if wanted is None:
            seen = {name for _, probe in self.probes_in(start, end) for name in probe.seen}
            wanted = (self.held(end) | seen) - before
        chosen: set[int] = set()
        inputs: set[str] = set()
        weights: set[str] = set()
        waiting = list(wanted)
        while waiting:
            name = waiting.pop()
            place = self.places.get(name, -1)
            if place < start and name not in self._free:
                inputs.add(name)
            elif place not in chosen:
                chosen.add(place)
                waiting += self._reads[place]
                weights |= self._of_weights(self.nodes[place])
        return Segment(
            tuple(self.nodes[place] for place in sorted(chosen)),
            tuple(sorted(inputs)),
            tuple(sorted(wanted, key=lambda name: (self.places[name], name))),
            tuple(sorted(weights)),
        )

    def computed(self, start: int, end: int) -> list[str]:
        """All values that a segment computes and that something needs."""
        places = [p for p in sorted(self.needed) if start <= p < end]
        return [v.name for p in places for v in self.nodes[p].outputs if v.name]

    def _read(self, node: ir.Node) -> list[str]:
        """The values that must be there when an operator runs; no weights."""
        given = [v for v in (*node.inputs, *captured(node)) if v is not None]
        return list(dict.fromkeys(v.name or "" for v in given if v.name not in self._weights))

    def _of_weights(self, node: ir.Node) -> set[str]:
        given = [v for v in (*node.inputs, *captured(node)) if v is not None]
        return {v.name or "" for v in given if v.name in self._weights}

    def _computed_from_weights(self) -> frozenset[str]:
        found: set[str] = set()
        for node, reads in zip(self.nodes, self._reads, strict=True):
            if not _is_random(node) and found.issuperset(reads):
                found.update(v.name or "" for v in node.outputs)
        return frozenset(found)

    def _needed(self) -> set[int]:
        needed: set[int] = set()
        waiting = [n for probes in self.probes.values() for p in probes for n in p.seen]
        while waiting:
            place = self.places.get(waiting.pop())
            if place is not None and place not in needed:
                needed.add(place)
                waiting += self._reads[place]
        return needed

    def _constant(self, shared: Collection[str]) -> frozenset[str]:
        varying = set(self.inputs) - set(shared)
        constant: set[str] = set()
        for place in sorted(self.needed):
            node = self.nodes[place]
            content = [] if node.op_type in _MEASURING else self._reads[place]
            names = {v.name or "" for v in node.outputs}
            if _is_random(node) or not varying.isdisjoint(content):
                varying |= names
            else:
                constant |= names
        return frozenset(constant)


def _is_random(node: ir.Node) -> bool:
    if node.op_type in _RANDOM or (node.op_type == "Dropout" and trains(node)):
        return True
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return any(_is_random(inner) for graph in graphs for inner in graph)
