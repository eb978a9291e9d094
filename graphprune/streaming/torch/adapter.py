"""Traced graphs as the loop of a streamed run knows them: node by node, in one floating dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import flat_inputs
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import stand_ins
from graphprune.streaming.core.adapter import Options, Sighting, StreamedModel
from graphprune.streaming.core.cache import ActivationCache
from graphprune.streaming.core.sites import Globs, Site, Sites
from graphprune.streaming.core.weights import TreatedWeights
from graphprune.streaming.torch.biases import torch_biases
from graphprune.streaming.torch.finite import explain
from graphprune.streaming.torch.runner import MaskedRunner, Runner, Values
from graphprune.streaming.torch.schedule import TorchSchedule
from graphprune.streaming.torch.sites import find_sites
from graphprune.streaming.torch.sums import summands
from graphprune.streaming.torch.weights import apply_weights


@dataclass(frozen=True)
class TorchAdapter:
    """A traced program, as streamed runs know it; see `GraphAdapter`."""

    program: Program

    def find_sites(self, include: Globs | None, exclude: Globs, *, every: bool) -> Sites:
        """Find where weights are applied."""
        return find_sites(self.program, include, exclude, every=every)

    def find_biases(self, sites: Iterable[Site]) -> dict[str, str]:
        """Find the biases of linear layers and convolutions."""
        return torch_biases(self.program, sites)

    def summands(self, sites: Iterable[Site]) -> dict[str, str]:
        """Find what products are added to."""
        return summands(self.program, sites)

    def with_weights(self, new: Mapping[str, Tensor]) -> Program:
        """The program with some weights exchanged."""
        return apply_weights(self.program, new)

    def models(
        self, sites: Sites, batches: Sequence[Batch], treated: TreatedWeights, options: Options
    ) -> list[TorchModel]:
        """The model that is treated, and the dense one if it runs along."""
        program, dtype, selection = self.program, options.dtype, options.selection
        device = options.placement.target
        _check_weights(program, sites)
        cuts = None if selection is None else stand_ins(selection)
        schedule = TorchSchedule(program, sites, sums=options.reference, stand_ins=cuts)
        runners = [
            Runner(program, schedule, dtype, treated.current, device=device)
            if selection is None
            else MaskedRunner(program, schedule, dtype, treated.current, selection, device)
        ]
        if options.reference:
            dense = program.weights.__getitem__
            runners.append(Runner(program, schedule, dtype, dense, device=device))
        leaves = [flat_inputs(program.exported, (batch.args, batch.kwargs)) for batch in batches]
        return [TorchModel(runner, batches, leaves, options) for runner in runners]


class TorchModel(StreamedModel):
    """A traced graph on the way of all batches; see `StreamedModel`."""

    schedule: TorchSchedule

    def __init__(
        self,
        runner: Runner,
        batches: Sequence[Batch],
        leaves: Sequence[list[Any]],
        options: Options,
    ) -> None:
        """A model.

        Args:
            runner: runs its nodes.
            batches: what goes through it.
            leaves: of each batch, the inputs in the order of the graph.
            options: of the run.
        """
        self.runner = runner
        self.schedule = runner.schedule
        self.batches = batches
        self.leaves = leaves
        self.sizes = [tuple(map(_size, own)) for own in leaves]
        self.cache = ActivationCache(self.sizes, options.dtype, options.waiting)

    def forward(self, group: int, batch: int) -> Iterator[Sighting]:
        """Run a batch from the barrier before a group's to its own."""
        schedule = self.schedule
        start, end = schedule.partition(group)
        values = self._fetch(group, batch)
        for place in range(start, end):
            if place > start:
                yield from self._probe(place, values)
            node = schedule.nodes[place]
            if node in schedule.needed and node.op != "placeholder":
                values[node] = self._value(node, values, batch)
            for dead in schedule.dead_after(place):
                values.pop(dead, None)
        yield from self._probe(end, values)
        own = {n.name: v for n, v in values.items() if n not in schedule.constant}
        self.cache.hold(batch, own)
        values.clear()  # whoever still has a sighting

    def _fetch(self, group: int, batch: int) -> Values:
        """What a batch has at the start of a partition."""
        if group == 0:
            self.cache.own[batch] = self._given(batch)
        held = {**self.cache.shared_with(batch), **self.cache.fetch(batch)}
        return {self.schedule.named[name]: value for name, value in held.items()}

    def _given(self, batch: int) -> dict[str, Any]:
        """The inputs of a batch that are needed."""
        return {n.name: v for n, v in self.runner.given(self.leaves[batch]).items()}

    def _value(self, node: fx.Node, values: Values, batch: int) -> Any:
        """Run a node, or take its value where another batch of these sizes has computed it."""
        if node not in self.schedule.constant:
            return self.runner.execute(node, values, self.sizes[batch])
        shared = self.cache.shared_with(batch)
        if node.name not in shared:
            shared[node.name] = self.runner.execute(node, values, self.sizes[batch])
        return shared[node.name]

    def _probe(self, place: int, values: Values) -> Iterator[Sighting]:
        """Let the probes of a place see values, and drop those that are needed no more."""
        for probe in self.schedule.probes.get(place, ()):
            yield Sighting(place, probe, lambda name: values[self.schedule.named[name]])
        for dead in self.schedule.dead_at(place):
            values.pop(dead, None)

    def forget(self) -> None:
        """Let go of weights, which are about to change."""
        self.runner.forget()

    def saved(self) -> list[Mapping[str, Any]]:
        """The cache, but for the inputs of the model."""
        inputs = {node.name for node in self.schedule.inputs}
        return [{n: v for n, v in e.items() if n not in inputs} for e in self.cache.entries()]

    def restore(self, group: int, saved: Iterator[Mapping[str, Any]]) -> None:
        """Fill the cache with what was saved, and with the inputs."""
        super().restore(group, saved)
        held = self.held(group)
        for batch, values in enumerate(self.cache.own):
            inputs = {n: v for n, v in self._given(batch).items() if n in held}
            self.cache.own[batch] = self.cache.pack(inputs) | values

    def stored(self, name: str) -> Tensor:
        """A weight as it is stored, treated if it has been."""
        return self.runner.stored(name)

    def not_finite(self, site: Site, batch: int, place: int) -> PlanError:
        """The error for an activation with NaN or infinity."""
        return explain(self.runner, site, self.batches[batch], self.leaves[batch], place)


def _size(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _check_weights(program: Program, sites: Sites) -> None:
    for name in sites.parameters[:1]:
        if program.weights[name].is_meta:
            raise PlanError(
                "there are no weights to treat",
                why="the program was traced without them",
                hint="load the checkpoint with its weights",
            )
