"""Running a graph piece by piece, with gradients where they are wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import GraphRunner
from graphprune.ir.torch.liveness import values_read
from graphprune.ir.torch.randomness import draws
from graphprune.placement import present

Values = dict[fx.Node, Any]


class Pieces(GraphRunner):
    """Runs the nodes between two places, on values that have waited at the first.

    A place is a position in the order of nodes: what comes before it has run, what is there hasn't.

    Attributes:
        nodes: all nodes, in order.
        places: name of a value to the place of its node.
        constant: the nodes that depend on sizes and buffers only.
        trained: parameters that read as these tensors, by canonical name.
        new: parameters that have other values than those the model is stored with.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        aliases: Mapping[str, str],
        *,
        ends: Collection[str],
        trainable: Collection[str],
    ) -> None:
        """A runner.

        Args:
            exported: the graph.
            weights: tensors by name.
            dtype: the floating dtype of everything.
            aliases: tied name to canonical name.
            ends: names of the values that are wanted.
            trainable: names of what may be trained.

        Raises:
            PlanError: the values depend on random numbers.
        """
        super().__init__(exported, weights, dtype, aliases, device=present().target)
        self.nodes: list[fx.Node] = list(self.graph.nodes)
        self.places = {n.name: i for i, n in enumerate(self.nodes)}
        self.trained: dict[str, Tensor] = {}
        self.new: dict[str, Tensor] = {}
        self._converted: dict[str, Tensor] = {}
        self._ends = frozenset(self.nodes[self.places[name]] for name in ends)
        self._needed = self._leading_to(self._ends)
        noisy = [n.name for n in self.nodes if n in self._needed and draws(n)]
        if noisy:
            raise PlanError(
                "a model that draws random numbers can't be matched block by block",
                where=noisy[0],
                hint="trace it in evaluation mode",
            )
        self.constant = self._constant(frozenset(trainable))
        self._dead = self._deaths()

    def given(self, leaves: list[Any]) -> Values:
        """The values of the user inputs that are needed."""
        inputs = [n for n in self.nodes if n.op == "placeholder" and n.name not in self._state]
        pairs = zip(inputs, leaves, strict=True)
        return {n: self._cast(leaf) for n, leaf in pairs if n in self._needed}

    def advance(self, values: Values, constants: Values, start: int, end: int) -> Values:
        """Run from one place to another.

        Args:
            values: what waits at `start`; left as it is.
            constants: values of constant nodes for these sizes; new ones are added.
            start: the first place.
            end: the place before which to stop.

        Returns:
            What is needed from `end` on, and the ends that were reached.
        """
        self.env = {**constants, **values}
        for place in range(start, end):
            node = self.nodes[place]
            runs = node in self._needed and node.op not in ("placeholder", "get_attr")
            if runs and node not in self.env:
                self.env[node] = self.run_node(node)
                if node in self.constant:
                    constants[node] = self.env[node]
            for dead in self._dead.get(place, ()):
                self.env.pop(dead, None)
        found = {n: v for n, v in self.env.items() if n not in self.constant}
        self.env = {}
        return found

    def settle(self, constants: Values, place: int) -> Values:
        """The constants that are needed from a place on."""
        return {n: v for n, v in constants.items() if self._last[n] >= place}

    def forget(self) -> None:
        """Let go of converted weights."""
        self._converted.clear()

    def read_between(self, name: str, start: int, end: int) -> bool:
        """Whether a parameter is read, and only between two places."""
        users = [
            self.places[user.name]
            for node in self.nodes
            if (own := self._state.get(node.name)) and self.aliases.get(own, own) == name
            for user in node.users
        ]
        return bool(users) and all(start <= place < end for place in users)

    def stored(self, name: str) -> Tensor:
        """A weight in the type that it is stored in."""
        return self.new[name] if name in self.new else self.weights[name].detach()

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """`args` with values in place of nodes; weights are read now."""

        def load(node: fx.Node) -> Any:
            name = self._state.get(node.name)
            if name is not None:
                return self._read(node, name)
            if node.op == "get_attr":  # a graph within the graph
                return self.fetch_attr(str(node.target))
            return self.env[node]

        return fx.map_arg(args, load)

    def _compute(
        self,
        target: torch._ops.OpOverload[..., Any],
        arguments: dict[str, Any],
        nodes: Mapping[str, Any],
    ) -> Any:
        if target is torch.ops.aten.copy.default:  # has no derivative as an operator
            own, source = arguments["self"], arguments["src"]
            return source.to(own.dtype).expand_as(own)
        return super()._compute(target, arguments, nodes)

    def _read(self, node: fx.Node, name: str) -> Any:
        name = self.aliases.get(name, name)
        if name in self.trained:
            return self._cast(self.trained[name])
        if name not in self._converted:
            own = self.new.get(name)
            self._converted[name] = (
                super()._read(node, name) if own is None else self._cast(own.detach())
            )
        return self._converted[name]

    def _leading_to(self, ends: Collection[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node not in needed and node.name not in self._state:
                needed.add(node)
                waiting.extend(node.all_input_nodes)
        return needed

    def _constant(self, trainable: frozenset[str]) -> frozenset[fx.Node]:
        varying: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                name = self._state.get(node.name)
                if name is None or self.aliases.get(name, name) in trainable:
                    varying.add(node)
            elif not varying.isdisjoint(values_read(node)):
                varying.add(node)
        return frozenset(self._needed - varying)

    def _deaths(self) -> dict[int, list[fx.Node]]:
        """What nobody needs once the node of a place has run."""
        last = {n: self.places[n.name] for n in self._needed}
        for node in self._ends:
            last[node] += 1  # it is looked at before the next node runs
        for node in self.nodes:
            for operand in node.all_input_nodes if node in self._needed else ():
                if operand in last:
                    last[operand] = max(last[operand], self.places[node.name])
        self._last = last
        dead = defaultdict(list)
        for node, place in last.items():
            dead[place].append(node)
        return dead
