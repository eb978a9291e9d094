"""ONNX graphs as the loop of a streamed run knows them: partition by partition, in a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.placement.waiting import Held
from graphprune.streaming.core.adapter import Options, Sighting, StreamedModel
from graphprune.streaming.core.cache import ActivationCache
from graphprune.streaming.core.sites import Globs, Group, Site, Sites
from graphprune.streaming.core.weights import TreatedWeights, fitting
from graphprune.streaming.onnx.biases import onnx_biases
from graphprune.streaming.onnx.finite import explain
from graphprune.streaming.onnx.masked import masked_groups, masked_model, others
from graphprune.streaming.onnx.pieces import Piece
from graphprune.streaming.onnx.schedule import OnnxSchedule
from graphprune.streaming.onnx.sites import find_onnx_sites
from graphprune.streaming.onnx.sums import Slot, summands

Sizes: TypeAlias = "tuple[tuple[int, ...], ...]"


@dataclass(frozen=True)
class OnnxAdapter:
    """An ONNX program, as streamed runs know it; see `GraphAdapter`."""

    program: OnnxProgram

    def find_sites(self, include: Globs | None, exclude: Globs, *, every: bool) -> Sites:
        """Find where weights are applied."""
        return find_onnx_sites(self.program, include, exclude, every=every)

    def find_biases(self, sites: Iterable[Site]) -> dict[str, str]:
        """Find the biases of products and convolutions."""
        return onnx_biases(self.program, sites)

    def summands(self, sites: Iterable[Site]) -> dict[str, Slot]:
        """Find what products are added to."""
        return summands(self.program, sites)

    def with_weights(self, new: Mapping[str, Tensor]) -> OnnxProgram:
        """The program with some weights exchanged."""
        return self.program.with_weights(fitting(self.program, new))

    def models(
        self, sites: Sites, batches: Sequence[Batch], treated: TreatedWeights, options: Options
    ) -> list[OnnxModel]:
        """The model that is treated, and the dense one if it runs along.

        Operators run in the types that the model has. As a plan leaves it, it is masked for
        batches of one size.

        Raises:
            PlanError: the batches of a masked model have several sizes.
        """
        program, graph, groups = self.program, self.program.model, sites.groups
        slots = self.summands(s for g in groups for s in g.sites) if options.reference else None
        sizes = [_sizes(batch) for batch in batches]
        alike = _alike(batches, sizes)

        def model(
            graph: ir.Model, groups: Sequence[Group], treated: Mapping[str, Tensor]
        ) -> OnnxModel:
            added = None if slots is None else others(graph, slots)
            schedule = OnnxSchedule(graph.graph, groups, alike, added)
            cache = ActivationCache(sizes, torch.float32, options.waiting)
            return OnnxModel(program, graph, schedule, batches, treated, cache, options.held)

        dense = [model(graph, groups, {})] if options.reference else []
        if options.selection is None:
            return [model(graph, groups, treated), *dense]
        masked = masked_model(program, options.selection, _one_size(batches, sizes))
        return [model(masked, masked_groups(program, masked, groups), treated), *dense]


@dataclass
class OnnxModel(StreamedModel):
    """An ONNX graph on the way of all batches; see `StreamedModel`.

    Attributes:
        program: the dense program.
        model: the graph, dense or masked.
        schedule: when everything happens in it.
        batches: what goes through it.
        treated: the initialisers that are others by now.
        cache: what waits for the next partition.
        how: in which type it does.
    """

    program: OnnxProgram
    model: ir.Model
    schedule: OnnxSchedule
    batches: Sequence[Batch]
    treated: Mapping[str, Tensor]
    cache: ActivationCache
    how: Held
    _opened: tuple[Piece, frozenset[str]] | None = None

    def forward(self, group: int, batch: int) -> Iterator[Sighting]:
        """Run a batch from the barrier before a group's to its own."""
        start, end = self.schedule.partition(group)
        if self._opened is None:
            self._opened = self._open(start, end), self.schedule.held(end)
        piece, kept = self._opened
        values = self._waiting(batch)
        values |= piece(values)
        for place, probe in self.schedule.probes_in(start, end):
            yield Sighting(place, probe, values.__getitem__)
        own, shared = {}, self.cache.shared_with(batch)
        for name, value in values.items():
            if name in kept and name in self.schedule.constant:
                shared.setdefault(name, value)
            elif name in kept:
                own[name] = value
        self.cache.own[batch] = self.cache.pack(own)
        values.clear()  # whoever still has a sighting

    def _waiting(self, batch: int) -> dict[str, Any]:
        """What a batch has at the start of a partition, as it is held."""
        given = self.batches[batch].kwargs
        return {**given, **self.cache.shared_with(batch), **self.cache.own[batch]}

    def _open(self, start: int, end: int) -> Piece:
        """A partition, ready to run."""
        segment = self.schedule.segment(start, end)
        some = self._waiting(0)
        types = {name: self._type(name, some[name]) for name in segment.inputs}
        return Piece(self.model, segment, types, self._initializer)

    def _type(self, name: str, value: Any) -> ir.DataType:
        """The type of a value in the graph, whatever it is held in."""
        known = self.program.known.get(name)
        if known is not None:
            return known.dtype
        return ir.DataType.FLOAT if value.dtype == self.how.dtype else from_torch_dtype(value.dtype)

    def _initializer(self, name: str) -> ir.TensorProtocol:
        """An initialiser as it is now."""
        if name in self.treated:
            return TorchTensor(self.treated[name], name)
        found = self.model.graph.initializers[name].const_value
        assert found is not None  # every initialiser of a program has data
        return found

    def forget(self) -> None:
        """Let go of the partition's own model, and of weights."""
        self._opened = None

    def stored(self, name: str) -> Tensor:
        """A weight as it is stored, treated if it has been."""
        return self.treated[name] if name in self.treated else self.program.weights[name]

    def not_finite(self, site: Site, batch: int, place: int) -> PlanError:
        """The error for an activation with NaN or infinity."""
        own = self.batches[batch]
        return explain(self.model, self.schedule, self._initializer, site, own, place)


def _sizes(batch: Batch) -> Sizes:
    return tuple(
        tuple(x.shape) if isinstance(x, Tensor) else (len(x),) for x in batch.kwargs.values()
    )


def _one_size(batches: Sequence[Batch], sizes: Sequence[Sizes]) -> dict[str, tuple[int, ...]]:
    """The shapes of all samples, for masks that are made for these.

    Raises:
        PlanError: they have several.
    """
    if len(set(sizes)) > 1:
        raise PlanError(
            "samples of several sizes can't be streamed as a plan leaves the model",
            why=", ".join(map(str, dict.fromkeys(sizes))),
            hint="give windows of one length, and as many in every batch",
        )
    return dict(zip(batches[0].kwargs, sizes[0], strict=True))


def _alike(batches: Sequence[Batch], sizes: Sequence[Sizes]) -> list[str]:
    """Inputs that are equal in all samples of the same sizes, such as a mask of ones."""
    first: dict[Sizes, Mapping[str, Any]] = {}
    for own, batch in zip(sizes, batches, strict=True):
        first.setdefault(own, batch.kwargs)

    def same(name: str) -> bool:
        pairs = ((first[own][name], b.kwargs[name]) for own, b in zip(sizes, batches, strict=True))
        return all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in pairs)

    return [name for name in batches[0].kwargs if same(name)]
