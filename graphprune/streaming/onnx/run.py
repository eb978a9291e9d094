"""The streamed run over an ONNX graph, which does what `graphprune.streaming.torch.run` does.

A segment is a model of its own (`graphprune.streaming.onnx.pieces`), which every sample goes
through before the next barrier's weights are treated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.plan.plan import Selection
from graphprune.streaming.core.cache import Held
from graphprune.streaming.core.checkpoint import State
from graphprune.streaming.core.gaps import GapObserver, tell_gap
from graphprune.streaming.core.observer import Observer, show
from graphprune.streaming.core.padding import Padding
from graphprune.streaming.core.sites import Group, Sites
from graphprune.streaming.core.weights import TreatedWeights
from graphprune.streaming.onnx.biases import onnx_biases
from graphprune.streaming.onnx.finite import not_finite
from graphprune.streaming.onnx.masked import masked_groups, masked_model, others
from graphprune.streaming.onnx.pieces import Piece, Values
from graphprune.streaming.onnx.schedule import OnnxSchedule, Probe, Segment
from graphprune.streaming.onnx.sums import Slot, summands
from graphprune.streaming.torch.run import Recording, Step, Treatment

Sizes: TypeAlias = "tuple[tuple[int, ...], ...]"


def stream_onnx(
    program: OnnxProgram,
    sites: Sites,
    batches: Sequence[Batch],
    treatment: Treatment,
    *,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | Held | None = None,
    reference: bool = False,
    selection: Selection | None = None,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> TreatedWeights:
    """See `graphprune.streaming.stream`, with these differences.

    Args:
        program: its operators run in the types that the model has.
        sites: as there.
        batches: as there.
        treatment: as there.
        dtype: of the rows that observers see, at least.
        held: as there; the dtype is that of float32 values.
        reference: as there.
        selection: as there; samples must have one size then.
        progress: as there.
        state: as there.

    Raises:
        PlanError: as there; also if nothing can run a part of the model.
        LoadError: as there.
    """
    with torch.no_grad():
        how = Held.of(held)
        run = _Run(program, sites, batches, treatment, dtype, how, state, reference, selection)
        return run.treat(progress or (lambda step: None))


@dataclass
class _Lane:
    """One model on the way of all samples through the graph.

    Attributes:
        model: the model.
        schedule: when everything happens in it.
        weight: an initialiser as it is now.
        held: what waits for the next segment, by sample.
        shared: what is the same for all samples of the same sizes, by these.
        piece: the segment that the samples go through; None where nothing is to be computed.
    """

    model: ir.Model
    schedule: OnnxSchedule
    weight: Callable[[str], ir.TensorProtocol]
    held: list[Values]
    shared: dict[Sizes, Values]
    piece: Piece | None = None


@dataclass
class _Run:
    """One streamed run."""

    program: OnnxProgram
    sites: Sites
    batches: Sequence[Batch]
    treatment: Treatment
    dtype: torch.dtype
    how: Held
    state: State | None
    reference: bool
    selection: Selection | None
    observers: dict[int, list[Observer]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise PlanError("there is no calibration data", hint="give at least one sample")
        self.groups = self.sites.groups
        self.sizes = [_sizes(batch) for batch in self.batches]
        self.treated = TreatedWeights(self.program)
        self.padding = Padding(self.program)
        self.biases = onnx_biases(self.program, self.sites.all.values())
        self.lanes = list(self._lanes())
        self.schedule = self.lanes[0].schedule
        if self.state is not None:
            settings = {
                "dtype": str(self.dtype),
                "held": str(self.how.dtype),
                "reference": str(self.reference),
                "masked": str(self.selection is not None),
            }
            self.done = self.state.begin(self.program, self.groups, self.batches, settings)

    def treat(self, progress: Callable[[Step], None]) -> TreatedWeights:
        """Go through all groups."""
        if self.state is not None and self.done == len(self.groups):
            for group in self.groups:
                self._take(group)
            return self.treated
        first = self._restore()
        for group in self.groups[first:]:
            self._advance(group.index)
            restored = group.index < self.done
            if restored:
                self._take(group)
            else:
                self._treat(group)
                if self.state is not None:
                    self._save(group)
            self.observers.pop(group.index, None)
            tokens = tuple(self.tokens.pop(group.index, ()))
            held = self.schedule.held(self.schedule.barriers[group.index])
            progress(Step(group, len(self.groups), tokens, held, self._held_bytes(), restored))
        if self.state is not None:
            self.state.finish()
        return self.treated

    def _lanes(self) -> Iterator[_Lane]:
        """The model that is treated, and the dense one if it runs along."""
        dense, groups = self.program.model, self.groups
        slots = None
        if self.reference:
            slots = summands(self.program, (s for g in groups for s in g.sites))
        if self.selection is None:
            yield self._lane(dense, groups, slots, treated=True)
        else:
            masked = masked_model(self.program, self.selection, self._one_size())
            moved = masked_groups(self.program, masked, groups)
            yield self._lane(masked, moved, slots, treated=True)
        if self.reference:
            yield self._lane(dense, groups, slots, treated=False)

    def _lane(
        self,
        model: ir.Model,
        groups: Sequence[Group],
        slots: Mapping[str, Slot] | None,
        *,
        treated: bool,
    ) -> _Lane:
        def weight(name: str) -> ir.TensorProtocol:
            if treated and name in self.treated:
                return TorchTensor(self.treated[name], name)
            found = model.graph.initializers[name].const_value
            assert found is not None  # every initialiser of a program has data
            return found

        added = None if slots is None else others(model, slots)
        schedule = OnnxSchedule(model.graph, groups, _alike(self.batches, self.sizes), added)
        waiting: list[Values] = [{} for _ in self.batches]
        return _Lane(model, schedule, weight, waiting, {sizes: {} for sizes in self.sizes})

    def _one_size(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all samples, for masks that are made for these.

        Raises:
            PlanError: they have several.
        """
        if len(set(self.sizes)) > 1:
            raise PlanError(
                "samples of several sizes can't be streamed as a plan leaves the model",
                why=", ".join(map(str, dict.fromkeys(self.sizes))),
                hint="give windows of one length, and as many in every batch",
            )
        return dict(zip(self.batches[0].kwargs, self.sizes[0], strict=True))

    def _advance(self, number: int) -> None:
        """Bring all samples from the barrier before a group to that of the group."""
        for lane in self.lanes:
            segment = lane.schedule.segment(*self._span(lane, number))
            if segment.nodes:
                lane.piece = Piece(lane.model, segment, self._types(lane, segment), lane.weight)
        spans = [self._span(lane, number) for lane in self.lanes]
        kept = [lane.schedule.held(end) for lane, (_, end) in zip(self.lanes, spans, strict=True)]
        probes = [
            lane.schedule.probes_in(*span) for lane, span in zip(self.lanes, spans, strict=True)
        ]
        for sample, batch in enumerate(self.batches):
            values = [self._values(lane, sample) for lane in self.lanes]
            for due in zip(*probes, strict=True):
                if due[0][1].group.index >= self.done:
                    self._observe(batch, due, values)
            for lane, own, names in zip(self.lanes, values, kept, strict=True):
                self._hold(lane, sample, {n: v for n, v in own.items() if n in names})
        for lane, names in zip(self.lanes, kept, strict=True):
            lane.piece = None
            for sizes, found in lane.shared.items():
                lane.shared[sizes] = {n: v for n, v in found.items() if n in names}

    def _span(self, lane: _Lane, number: int) -> tuple[int, int]:
        """The places of a group's barrier and the one before."""
        barriers = (0, *lane.schedule.barriers)
        return barriers[number], barriers[number + 1]

    def _types(self, lane: _Lane, segment: Segment) -> dict[str, ir.DataType]:
        """The types of a segment's inputs in the graph."""
        some = {**self._given(0), **lane.shared[self.sizes[0]], **lane.held[0]}
        return {name: self._type(name, some[name]) for name in segment.inputs}

    def _type(self, name: str, value: Any) -> ir.DataType:
        """The type of a value in the graph, whatever it is held in."""
        known = self.program.known.get(name)
        if known is not None:
            return known.dtype
        return ir.DataType.FLOAT if value.dtype == self.how.dtype else from_torch_dtype(value.dtype)

    def _given(self, number: int) -> dict[str, Any]:
        return self.batches[number].kwargs

    def _values(self, lane: _Lane, number: int) -> dict[str, Any]:
        """All that a sample has in a segment, after it has gone through it."""
        shared = lane.shared[self.sizes[number]]
        values = {**self._given(number), **shared, **lane.held[number]}
        return values if lane.piece is None else {**values, **lane.piece(values)}

    def _hold(self, lane: _Lane, number: int, values: Values) -> None:
        """Keep what waits for the next segment; what samples share once."""
        shared = lane.shared[self.sizes[number]]
        own = {n: v for n, v in values.items() if n not in self.schedule.constant}
        lane.held[number] = {n: self._packed(v) for n, v in own.items()}
        for name in values.keys() - own.keys() - shared.keys():
            shared[name] = values[name]

    def _packed(self, value: Tensor) -> Tensor:
        """A value as it is held."""
        if self.how.dtype is not None and value.dtype == torch.float32:
            value = value.to(self.how.dtype)
        return self.how.away(value)

    def _observe(
        self,
        batch: Batch,
        due: Sequence[tuple[int, Probe]],
        values: Sequence[dict[str, Any]],
    ) -> None:
        """Show a value to a group's statistic; in all lanes the same one is due."""
        place, probe = due[0]
        group, site = self.groups[probe.group.index], probe.site
        if group.index not in self.observers:
            parts = range(group.parts)
            self.observers[group.index] = [self.treatment.observer(group, p) for p in parts]
            self.tokens[group.index] = [0] * group.parts
        observers, tokens = self.observers[group.index], self.tokens[group.index]
        x = self._wide(values[0][site.reads])
        # In a masked model the value has another name, and that of the operator's own operand says
        # what its axes are.
        named = site if self.selection is None else replace(site, reads=site.operand)
        valid = self.padding.rows(named, x, batch.valid)
        for part, rows in site.layout.rows(x, None, valid):
            if not len(rows):
                continue
            if not show(observers[part], rows):
                lane = self.lanes[0]
                raise not_finite(lane.model, lane.schedule, lane.weight, site, batch, place)
            tokens[part] += len(rows)
        if len(values) > 1:
            self._observe_gaps([probe for _, probe in due], values, x, valid, observers)

    def _observe_gaps(
        self,
        probes: Sequence[Probe],
        values: Sequence[dict[str, Any]],
        x: Tensor,
        valid: Tensor | None,
        observers: Sequence[Observer],
    ) -> None:
        """Tell observers what the outputs lack that the dense model has."""
        layout = probes[0].site.layout
        wanted = self._wide(values[1][probes[1].site.reads])
        for (parameter, other), (_, dense) in zip(probes[0].sums, probes[1].sums, strict=True):
            matrices = layout.matrices(self.program.weights[parameter])
            pairs = zip(layout.rows(x, None, valid), layout.rows(wanted, None, valid), strict=True)
            for (part, rows), (_, dense_rows) in pairs:
                observer = observers[part]
                in_stream = other is not None
                if not isinstance(observer, GapObserver) or not observer.wants_gap(
                    parameter, in_stream
                ):
                    continue
                beside = None
                if other is not None and dense is not None:
                    beside = self._wide(values[0][other]), self._wide(values[1][dense])
                tell_gap(observer, parameter, matrices[part], (rows, dense_rows), beside, valid)

    def _wide(self, x: Tensor) -> Tensor:
        """A value in the dtype of statistics, or its own if that is wider."""
        return x.to(torch.promote_types(x.dtype, self.dtype))

    def _take(self, group: Group) -> None:
        """Take the new weights of a group from the files of an interrupted run."""
        assert self.state is not None
        self.treated.take_file(self.state.weights_file(group.index))
        if isinstance(self.treatment, Recording):
            self.treatment.recall(group, self.state.record_of(group.index))

    def _treat(self, group: Group) -> None:
        """Have the weights of a group changed, one at a time."""
        observers = self.observers[group.index]
        names = self._named(group)
        weights = self.treated.lazily(names)
        for name, weight in self.treatment.treat(group, observers, weights):
            self.treated.take(names, name, weight)
            del weight

    def _named(self, group: Group) -> tuple[str, ...]:
        """The weights of a group and their biases."""
        own = (self.biases.get(name) for name in group.parameters)
        return (*group.parameters, *(name for name in own if name is not None))

    def _save(self, group: Group) -> None:
        """Save the new weights, and the activations where no statistic is half done."""
        assert self.state is not None
        changed = {n: self.treated[n] for n in self._named(group) if n in self.treated}
        record = self.treatment.record(group) if isinstance(self.treatment, Recording) else None
        self.treated.take_file(self.state.save_weights(group.index, changed, record))
        whole = self.observers.keys() <= {group.index}
        self.state.commit(group.index, self._waiting if whole else None)

    def _waiting(self) -> list[Values]:
        """All that is held: of every model, of every sample and then of all sizes."""
        return [values for lane in self.lanes for values in (*lane.held, *lane.shared.values())]

    def _restore(self) -> int:
        """Take up saved activations; the first group that has still to be reached."""
        found = self.state.load_values() if self.state is not None else None
        if found is None:
            return 0
        index, values = found
        loaded = iter(values)
        for lane in self.lanes:
            lane.held = [next(loaded) for _ in self.batches]
            lane.shared = {sizes: next(loaded) for sizes in lane.shared}
        for group in self.groups[: index + 1]:
            self._take(group)
        return index + 1

    def _held_bytes(self) -> int:
        """Memory of all held values."""
        return sum(x.nbytes for values in self._waiting() for x in values.values())


def _sizes(batch: Batch) -> Sizes:
    return tuple(
        tuple(x.shape) if isinstance(x, Tensor) else (len(x),) for x in batch.kwargs.values()
    )


def _alike(batches: Sequence[Batch], sizes: Sequence[Sizes]) -> list[str]:
    """Inputs that are equal in all samples of the same sizes, such as a mask of ones."""
    first: dict[Sizes, Mapping[str, Any]] = {}
    for own, batch in zip(sizes, batches, strict=True):
        first.setdefault(own, batch.kwargs)

    def same(name: str) -> bool:
        pairs = ((first[own][name], b.kwargs[name]) for own, b in zip(sizes, batches, strict=True))
        return all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in pairs)

    return [name for name in batches[0].kwargs if same(name)]
