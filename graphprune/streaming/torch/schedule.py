"""The order of a streamed run: barriers, probes, and how long each value lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.ir.torch.liveness import values_read
from graphprune.ir.torch.program import Program
from graphprune.streaming.core.layout import Experts, Matrix
from graphprune.streaming.core.sites import Group, Site, Sites, first_reads
from graphprune.streaming.torch.products import bind, operator


@dataclass(frozen=True, slots=True)
class Probe:
    """A place where a group's statistic sees a value.

    Attributes:
        group: the group.
        site: the first of its sites that reads the value.
        sums: each weight that reads it, and the value that its product is added to; None where
            the product goes elsewhere than straight into a sum. Empty unless asked for.
    """

    group: Group
    site: Site
    sums: tuple[tuple[str, fx.Node | None], ...] = ()


class Schedule:
    """When everything happens; places are positions in the graph's order of nodes.

    A barrier is a place: what comes before it has run for every sample, what is there hasn't.

    Attributes:
        nodes: all nodes of the graph, in order.
        barriers: the place of every group's treatment, in order of the groups.
        probes: place to the probes there, which happen before the node of that place runs.
        needed: what runs at all: what some probe depends on.
        constant: the needed nodes that depend on the sizes of the inputs only.
        weights: placeholders of weights to the names by which they are stored.
        inputs: placeholders of user inputs, in order.
        derived: views of weights that are products' operands; seen anew whenever they are read,
            since the weight may have changed.
        experts: products with chosen matrices, which run without gathering them.
    """

    def __init__(
        self,
        program: Program,
        sites: Sites,
        *,
        sums: bool = False,
        stand_ins: Mapping[str, str] | None = None,
    ) -> None:
        """The schedule of a program for the groups of `sites`.

        Args:
            program: the program.
            sites: what is treated.
            sums: whether probes look at what the products are added to.
            stand_ins: value name to the name of an earlier value that is needed there too.
        """
        exported = program.exported
        self._aliases = program.aliases
        self.nodes: list[fx.Node] = list(exported.graph.nodes)
        self.named = {n.name: n for n in self.nodes}
        self.places = {n.name: i for i, n in enumerate(self.nodes)}
        self.weights = {
            self.named[s.arg.name]: s.target
            for s in exported.graph_signature.input_specs
            if s.target is not None and s.arg.name in self.named
        }
        self.inputs = [n for n in self.nodes if n.op == "placeholder" and n not in self.weights]
        self._stand_ins = {self.named[a]: self.named[b] for a, b in (stand_ins or {}).items()}
        self.experts = {
            self.named[s.node]: s for s in sites.all.values() if isinstance(s.layout, Experts)
        }
        self.derived = self._derived(sites)
        self.barriers: list[int] = []
        self.probes: dict[int, list[Probe]] = {}
        for group in sites.groups:
            first = first_reads(group.sites, self.places)
            self.barriers.append(max(first.values()))
            for key, place in first.items():
                same = [s for s in group.sites if (s.reads, s.chosen) == key]
                others = tuple((s.parameter, self._other(s)) for s in same) if sums else ()
                self.probes.setdefault(place, []).append(Probe(group, same[0], others))
        self.needed = self._needed()
        self.constant = self._constant()
        self._after_node, self._after_probes = self._deaths()

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The values that must be there when `node` runs; no weights."""
        site = self.experts.get(node)
        if site is not None:
            assert site.chosen is not None
            return [self.named[site.operand], self.named[site.chosen]]
        reads = [n for n in node.all_input_nodes if n not in self.weights and n not in self.derived]
        return [*reads, self._stand_ins[node]] if node in self._stand_ins else reads

    def dead_after(self, place: int) -> list[fx.Node]:
        """The values that nobody needs once the node of `place` has run."""
        return self._after_node.get(place, [])

    def dead_at(self, place: int) -> list[fx.Node]:
        """The values that nobody needs once the probes of `place` have seen them."""
        return self._after_probes.get(place, [])

    def held(self, place: int) -> frozenset[str]:
        """Names of the values that live across a barrier."""
        return frozenset(
            n.name
            for i, n in enumerate(self.nodes[:place])
            if n in self.needed and (self._uses[n][0] >= place or self._uses[n][1] > place)
        )

    def _derived(self, sites: Sites) -> set[fx.Node]:
        """What stands between weights and their products: nothing else reads such a weight."""
        parameters = {s.parameter for s in sites.all.values()}
        found = {
            n for n, name in self.weights.items() if self._aliases.get(name, name) in parameters
        }
        for node in self.nodes:
            if node.name not in sites.all and any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found - self.weights.keys()

    def _needed(self) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        waiting = [n for probes in self.probes.values() for p in probes for n in self._seen(p)]
        while waiting:
            node = waiting.pop()
            if node not in needed and node not in self.weights:
                needed.add(node)
                waiting.extend(self.reads(node))
        return needed

    def _seen(self, probe: Probe) -> list[fx.Node]:
        """The values that a probe looks at."""
        names = (probe.site.reads, probe.site.chosen)
        seen = [self.named[n] for n in names if n is not None]
        return seen + [other for _, other in probe.sums if other is not None]

    def _other(self, site: Site) -> fx.Node | None:
        """What the product of a site is added to, if it has been computed when the site runs."""
        node = self.named[site.node]
        if not isinstance(site.layout, Matrix) or site.layout.features != -1:
            return None
        while len(node.users) == 1:
            (user,) = node.users
            kind = operator(user)
            if kind == "add" and len(user.all_input_nodes) == 2 and len(user.args) == 2:
                (other,) = (n for n in user.all_input_nodes if n is not node)
                if other in self.weights:  # a bias
                    node = user
                    continue
                same = _shape(other) == _shape(node)
                early = self.places[other.name] < self.places[site.node]
                alone = user.kwargs.get("alpha", 1) == 1
                return other if same and early and alone and other.op == "call_function" else None
            if kind not in _UNCHANGED:
                return None
            node = user
        return None

    def _constant(self) -> frozenset[fx.Node]:
        varying = set(self.inputs)
        for node in self.nodes:
            if node in self.needed and node.op != "placeholder":
                operands = self.reads(node) if node in self.experts else values_read(node)
                if _is_random(node) or any(n in varying for n in operands):
                    varying.add(node)
        return frozenset(self.needed - varying)

    def _deaths(self) -> tuple[dict[int, list[fx.Node]], dict[int, list[fx.Node]]]:
        uses = {n: [self.places[n.name], -1] for n in self.needed}
        for node in self.nodes:
            if node in self.needed and node.op != "placeholder":
                for operand in self.reads(node):
                    uses[operand][0] = max(uses[operand][0], self.places[node.name])
        for place, probes in self.probes.items():
            for value in (v for p in probes for v in self._seen(p)):
                if value in uses:
                    uses[value][1] = max(uses[value][1], place)
        self._uses = {n: (node, probe) for n, (node, probe) in uses.items()}
        after_node: dict[int, list[fx.Node]] = {}
        after_probes: dict[int, list[fx.Node]] = {}
        for value, (node_place, probe_place) in self._uses.items():
            if probe_place > node_place:
                after_probes.setdefault(probe_place, []).append(value)
            else:
                after_node.setdefault(node_place, []).append(value)
        return after_node, after_probes


_UNCHANGED = {"view", "reshape", "unsafe_view", "_unsafe_view", "unsqueeze", "squeeze", "clone",
              "contiguous", "alias", "_to_copy", "to", "dropout"}  # fmt: skip
"""Operators that leave the rows of a product as they are, up to the shape around them."""


def _shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return operator(node) != "dropout" or bool(bind(node)["train"])


def spans(barriers: Sequence[int]) -> list[tuple[int, int]]:
    """The segments between barriers, (first place, place of the barrier at the end)."""
    return list(zip((0, *barriers), barriers, strict=False))
