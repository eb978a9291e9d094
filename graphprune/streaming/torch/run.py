"""The streamed run: samples go through the graph segment by segment, weights change in between.

A segment ends where some group of weights is about to be used for the first time. All samples run
up to there and show the group's statistic the value that its weights read; then the weights are
treated, one at a time; then the samples go on with the new weights. So every statistic is that of
a model whose earlier weights have been treated already, and every operator runs once per sample.

A weight that is used several times is treated before its last use: its statistic is that of all
its uses, of which the earlier ones have run with the weight as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, fx

from graphprune.calibration.batches import Batch
from graphprune.checkpoints.memory import page_out
from graphprune.errors import PlanError
from graphprune.ir.torch.interpreter import flat_inputs
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Selection, stand_ins
from graphprune.streaming.core.cache import Held
from graphprune.streaming.core.checkpoint import State
from graphprune.streaming.core.gaps import GapObserver, tell_gap
from graphprune.streaming.core.observer import Observer, show
from graphprune.streaming.core.padding import Padding
from graphprune.streaming.core.sites import Group, Sites
from graphprune.streaming.core.weights import TreatedWeights
from graphprune.streaming.torch.biases import torch_biases
from graphprune.streaming.torch.finite import not_finite
from graphprune.streaming.torch.runner import Holder, MaskedRunner, Runner, Values, tensors_in
from graphprune.streaming.torch.schedule import Probe, Schedule, spans


@runtime_checkable
class Recording(Protocol):
    """A treatment whose decisions outlive an interruption."""

    def record(self, group: Group) -> Any:
        """What was decided for a group, as JSON data."""

    def recall(self, group: Group, record: Any) -> None:
        """Take up a decision of an interrupted run."""


class Treatment(Protocol):
    """What is done to the weights. See also `Recording`."""

    def observer(self, group: Group, part: int) -> Observer:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Change the weights of a group.

        Args:
            group: the group; `Group.layout` says how a weight is a stack of matrices ``[out, in]``.
            observers: one per part, which have seen all samples. One that has seen no token has
                never been called.
            weights: parameter name to tensor, as stored; each is read when it is asked for. It has
                the biases of these weights, too (`graphprune.streaming.biases`).

        Returns:
            (parameter, new weight of the same shape) pairs, each of which is taken before the next
            one is asked for; weights that don't appear stay as they are.
        """


@dataclass(frozen=True, slots=True)
class Step:
    """What a progress callback is told when a group has been treated.

    Attributes:
        group: the group.
        total: number of groups.
        tokens: rows that each part's observer has seen; 0 for an expert that no token chose.
        held: names of the values that wait for the next segment, for every sample.
        held_bytes: their memory, all samples together.
        restored: whether the weights came from an interrupted run.
    """

    group: Group
    total: int
    tokens: tuple[int, ...]
    held: frozenset[str]
    held_bytes: int
    restored: bool = False


@dataclass(slots=True)
class _Sample:
    """One batch on its way through the graph.

    Attributes:
        values: what waits for the next segment, in the treated model.
        dense: the same in the dense model, if that runs along.
    """

    batch: Batch
    leaves: list[Any]
    sizes: _Sizes
    values: Values
    dense: Values


def stream(
    program: Program,
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
    """Treat the weights of a program, each with statistics of the samples.

    Args:
        program: a traced program with weights; it isn't changed.
        sites: what to treat; see `find_sites`.
        batches: the samples; see `graphprune.calibration.batches`.
        treatment: what to do to the weights.
        dtype: of all floating computation.
        held: the dtype in which activations wait for the next segment, None for `dtype`; or how,
            with `Held`.
        reference: run the dense model along, and tell observers the gap (see `GapObserver`). It
            costs a second pass, the memory of its activations, and two products for each weight.
        selection: what a plan leaves: the treated model runs as if it had been applied.
        progress: called after each group.
        state: where to save progress, and to go on from; None saves nothing.

    Returns:
        The new weights by parameter, in the dtypes of the old ones.

    Raises:
        PlanError: the samples don't fit the program, an activation or a new weight isn't finite,
            or a new weight has another shape.
        LoadError: `state` belongs to another run.
    """
    run = _Run(program, sites, batches, treatment, dtype, held, state, reference, selection)
    with torch.no_grad():
        return run.treat(progress or (lambda step: None))


_Sizes: TypeAlias = tuple[Any, ...]
_Shared: TypeAlias = dict[_Sizes, Values]
"""What only depends on the sizes of the inputs, by these."""


class _Run:
    """One streamed run."""

    def __init__(
        self,
        program: Program,
        sites: Sites,
        batches: Sequence[Batch],
        treatment: Treatment,
        dtype: torch.dtype,
        held: torch.dtype | Held | None,
        state: State | None,
        reference: bool,
        selection: Selection | None,
    ) -> None:
        if not batches:
            raise PlanError("there is no calibration data", hint="give at least one sample")
        _check_weights(program, sites)
        self.program = program
        self.groups = sites.groups
        self.treatment = treatment
        cuts = stand_ins(selection) if selection is not None else {}
        self.schedule = Schedule(program, sites, sums=reference, stand_ins=cuts)
        self.treated = TreatedWeights(program)
        current = self.treated.current
        self.runner = (
            Runner(program, self.schedule, dtype, current)
            if selection is None
            else MaskedRunner(program, self.schedule, dtype, current, selection)
        )
        self.dense = _dense_runner(program, self.schedule, dtype) if reference else None
        how = Held.of(held)
        self.holder = Holder(dtype, how)
        self.whole = Holder(dtype, Held())
        self.padding = Padding(program)
        self.biases = torch_biases(program, sites.all.values())
        self.samples = [_sample(program, self.runner, batch) for batch in batches]
        self.constants: _Shared = {s.sizes: {} for s in self.samples}
        self.dense_constants: _Shared = {s.sizes: {} for s in self.samples}
        self.observers: dict[int, list[Observer]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.state = state
        self.done = 0
        if state is not None:
            settings = {
                "dtype": str(dtype),
                "held": str(how.dtype),
                "reference": str(reference),
                "masked": str(selection is not None),
            }
            self.done = state.begin(program, self.groups, batches, settings)

    def treat(self, progress: Callable[[Step], None]) -> TreatedWeights:
        """Go through all groups."""
        if self.state is not None and self.done == len(self.groups):
            for group in self.groups:
                self._take(group)
            return self.treated
        first = self._restore()
        for group, (start, end) in zip(self.groups, spans(self.schedule.barriers), strict=True):
            if group.index < first:
                continue
            for sample in self.samples:
                self._advance(sample, start, end)
            self._settle(end)
            self.runner.forget()
            if self.dense is not None:
                self.dense.forget()
            restored = group.index < self.done
            if restored:
                assert self.state is not None
                self._take(group)
            else:
                self._treat(group)
                if self.state is not None:
                    self._save(group)
            self.observers.pop(group.index, None)
            tokens = tuple(self.tokens.pop(group.index, ()))
            held = self.schedule.held(end)
            progress(Step(group, len(self.groups), tokens, held, self._held_bytes(), restored))
        if self.state is not None:
            self.state.finish()
        return self.treated

    def _advance(self, sample: _Sample, start: int, end: int) -> None:
        """Run one sample from a barrier to the next, in both models in step."""
        if start == 0:
            sample.values = self.runner.given(sample.leaves)
        values = {**self.constants[sample.sizes], **self.holder.unpack(sample.values)}
        sample.values = {}
        dense: Values = {}
        if self.dense is not None:
            if start == 0:
                sample.dense = self.dense.given(sample.leaves)
            dense = {**self.dense_constants[sample.sizes], **self.holder.unpack(sample.dense)}
            sample.dense = {}
        for place in range(start, end):
            if place > start:
                self._probe(place, sample, values, dense)
            node = self.schedule.nodes[place]
            if node in self.schedule.needed and node.op != "placeholder":
                self._execute(self.runner, node, values, sample.sizes, self.constants)
                if self.dense is not None:
                    self._execute(self.dense, node, dense, sample.sizes, self.dense_constants)
            for dead in self.schedule.dead_after(place):
                values.pop(dead, None)
                dense.pop(dead, None)
        self._probe(end, sample, values, dense)
        sample.values = self._held(values)
        sample.dense = self._held(dense)

    def _held(self, values: Values) -> Values:
        """The values that wait for the next segment."""
        own = {n: v for n, v in values.items() if n not in self.schedule.constant}
        return self.holder.pack(own)

    def _execute(
        self, runner: Runner, node: fx.Node, values: Values, sizes: _Sizes, shared: _Shared
    ) -> None:
        """Run a node, or take its value where another sample of these sizes has computed it."""
        constants = shared[sizes]
        if node in self.schedule.constant and node in constants:
            values[node] = constants[node]
            return
        values[node] = runner.execute(node, values, sizes)
        if node in self.schedule.constant:
            constants[node] = values[node]

    def _settle(self, end: int) -> None:
        """Let go of the shared values that no sample needs after a barrier."""
        kept = self.schedule.held(end)
        for shared in (self.constants, self.dense_constants):
            for sizes, constants in shared.items():
                live = {n: v for n, v in constants.items() if n.name in kept}
                shared[sizes] = self.whole.pack(live)

    def _probe(self, place: int, sample: _Sample, values: Values, dense: Values) -> None:
        """Show values to the statistics that are due at a place."""
        for probe in self.schedule.probes.get(place, ()):
            if probe.group.index >= self.done:
                self._observe(probe, sample, values, dense, place)
        for dead in self.schedule.dead_at(place):
            values.pop(dead, None)
            dense.pop(dead, None)

    def _observe(
        self, probe: Probe, sample: _Sample, values: Values, dense: Values, place: int
    ) -> None:
        group, site = probe.group, probe.site
        if group.index not in self.observers:
            parts = range(group.parts)
            self.observers[group.index] = [self.treatment.observer(group, p) for p in parts]
            self.tokens[group.index] = [0] * group.parts
        observers, tokens = self.observers[group.index], self.tokens[group.index]
        named = self.schedule.named
        x = values[named[site.reads]]
        chosen = None if site.chosen is None else values[named[site.chosen]]
        valid = self.padding.rows(site, x, sample.batch.valid)
        for part, rows in site.layout.rows(x, chosen, valid):
            if not len(rows):
                continue
            if not show(observers[part], rows):
                raise not_finite(self.runner, site, sample.batch, sample.leaves, place)
            tokens[part] += len(rows)
        # Tokens may have chosen other experts in the dense model: their rows don't correspond.
        if self.dense is not None and chosen is None:
            self._observe_gaps(probe, values, dense, valid, observers)

    def _observe_gaps(
        self,
        probe: Probe,
        values: Values,
        dense: Values,
        valid: Tensor | None,
        observers: Sequence[Observer],
    ) -> None:
        """Tell observers what the outputs lack that the dense model has."""
        assert self.dense is not None
        site = probe.site
        node = self.schedule.named[site.reads]
        x, wanted = values[node], dense[node]
        for parameter, other in probe.sums:
            matrices = site.layout.matrices(self.dense.stored(parameter))
            pairs = zip(
                site.layout.rows(x, None, valid), site.layout.rows(wanted, None, valid), strict=True
            )
            for (part, rows), (_, dense_rows) in pairs:
                observer = observers[part]
                in_stream = other is not None
                if not isinstance(observer, GapObserver) or not observer.wants_gap(
                    parameter, in_stream
                ):
                    continue
                beside = None if other is None else (values[other], dense[other])
                tell_gap(observer, parameter, matrices[part], (rows, dense_rows), beside, valid)

    def _take(self, group: Group) -> None:
        """Take the new weights of a group from the files of an interrupted run."""
        assert self.state is not None
        path = self.state.weights_file(group.index)
        self.treated.take_file(path)
        if isinstance(self.treatment, Recording):
            self.treatment.recall(group, self.state.record_of(group.index))

    def _treat(self, group: Group) -> None:
        """Have the weights of a group changed, one at a time."""
        observers = self.observers[group.index]
        names = self._own(group)
        weights = self.treated.lazily(names)
        for name, weight in self.treatment.treat(group, observers, weights):
            self.treated.take(names, name, weight)
            del weight
            page_out(self.program.weights[name])

    def _own(self, group: Group) -> tuple[str, ...]:
        """The weights of a group and their biases."""
        own = (self.biases.get(name) for name in group.parameters)
        return (*group.parameters, *(name for name in own if name is not None))

    def _save(self, group: Group) -> None:
        """Save the new weights, and the activations where no statistic is half done."""
        assert self.state is not None
        changed = {n: self.treated[n] for n in self._own(group) if n in self.treated}
        record = self.treatment.record(group) if isinstance(self.treatment, Recording) else None
        self.treated.take_file(self.state.save_weights(group.index, changed, record))
        whole = self.observers.keys() <= {group.index}
        values = self._saved_values if whole else None
        self.state.commit(group.index, values)

    def _saved_values(self) -> list[Mapping[str, Any]]:
        """The held values of all samples and then of all sizes, by name."""
        inputs = set(self.schedule.inputs)
        return [
            {n.name: v for n, v in values.items() if n not in inputs} for values in self._waiting()
        ]

    def _waiting(self) -> list[Values]:
        """All that is held: of every sample, then of all sizes; likewise of the dense model."""
        found = [*(s.values for s in self.samples), *self.constants.values()]
        if self.dense is not None:
            found += [*(s.dense for s in self.samples), *self.dense_constants.values()]
        return found

    def _restore(self) -> int:
        """Take up saved activations; the first group that has still to be reached."""
        found = self.state.load_values() if self.state is not None else None
        if found is None:
            return 0
        assert self.state is not None
        index, values = found
        end = self.schedule.barriers[index]
        held = self.schedule.held(end)
        named = self.schedule.named
        loaded = iter([{named[n]: v for n, v in entry.items()} for entry in values])
        for sample in self.samples:
            given = self.runner.given(sample.leaves)
            inputs = self.holder.pack({n: v for n, v in given.items() if n.name in held})
            sample.values = inputs | next(loaded)
        self.constants = {sizes: next(loaded) for sizes in self.constants}
        if self.dense is not None:
            for sample in self.samples:
                given = self.dense.given(sample.leaves)
                inputs = self.holder.pack({n: v for n, v in given.items() if n.name in held})
                sample.dense = inputs | next(loaded)
            self.dense_constants = {sizes: next(loaded) for sizes in self.dense_constants}
        for group in self.groups[: index + 1]:
            self._take(group)
        return index + 1

    def _held_bytes(self) -> int:
        """Memory of all held values, shared memory counted once."""
        found: dict[int, int] = {}
        for values in self._waiting():
            for x in (t for v in values.values() for t in tensors_in(v)):
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())


def _sample(program: Program, runner: Runner, batch: Batch) -> _Sample:
    leaves = flat_inputs(program.exported, (batch.args, batch.kwargs))
    sizes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return _Sample(batch, leaves, sizes, {}, {})


def _dense_runner(program: Program, schedule: Schedule, dtype: torch.dtype) -> Runner:
    return Runner(program, schedule, dtype, lambda name: program.weights[name])


def _check_weights(program: Program, sites: Sites) -> None:
    for name in sites.parameters[:1]:
        if program.weights[name].is_meta:
            raise PlanError(
                "there are no weights to treat",
                why="the program was traced without them",
                hint="load the checkpoint with its weights",
            )
