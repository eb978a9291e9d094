"""The order of a streamed run over a traced graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphprune.ir.torch.liveness import values_read
from graphprune.ir.torch.program import Program
from graphprune.streaming.core.layout import Experts
from graphprune.streaming.core.schedule import Schedule
from graphprune.streaming.core.sites import Sites
from graphprune.streaming.torch.products import bind, operator
from graphprune.streaming.torch.sums import summands


class TorchSchedule(Schedule):
    """When everything happens in a traced graph; see `Schedule`.

    Attributes:
        nodes: all nodes of the graph, in order.
        named: all nodes by name.
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
        super().__init__(
            sites.groups,
            {n.name: i for i, n in enumerate(self.nodes)},
            summands(program, (s for g in sites.groups for s in g.sites)) if sums else None,
        )
        self.needed = self._needed()
        self.constant = self._constant()
        operators = (n for n in self.nodes if n in self.needed and n.op != "placeholder")
        self.uses = self.last_uses(
            (n.name for n in self.needed),
            ((self.places[n.name], (r.name for r in self.reads(n))) for n in operators),
        )
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
        waiting = [self.named[n] for ps in self.probes.values() for p in ps for n in p.seen]
        while waiting:
            node = waiting.pop()
            if node not in needed and node not in self.weights:
                needed.add(node)
                waiting.extend(self.reads(node))
        return needed

    def _constant(self) -> frozenset[fx.Node]:
        varying = set(self.inputs)
        for node in self.nodes:
            if node in self.needed and node.op != "placeholder":
                operands = self.reads(node) if node in self.experts else values_read(node)
                if _is_random(node) or any(n in varying for n in operands):
                    varying.add(node)
        return frozenset(self.needed - varying)

    def _deaths(self) -> tuple[dict[int, list[fx.Node]], dict[int, list[fx.Node]]]:
        after_node: dict[int, list[fx.Node]] = {}
        after_probes: dict[int, list[fx.Node]] = {}
        for name, (node, probe) in self.uses.items():
            dead = after_probes if probe > node else after_node
            dead.setdefault(max(node, probe), []).append(self.named[name])
        return after_node, after_probes


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return operator(node) != "dropout" or bool(bind(node)["train"])
