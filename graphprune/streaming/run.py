"""The streamed run: samples go through the graph partition by partition, weights change in between.

A partition ends where some group of weights is about to be used for the first time. All samples run
up to there and show the group's statistic the value that its weights read; then the weights are
treated, one at a time; then the samples go on with the new weights. So every statistic is that of
a model whose earlier weights have been treated already, and every operator runs once per sample.

A weight that is used several times is treated before its last use: its statistic is that of all
its uses, of which the earlier ones have run with the weight as it was.

Where several processes share a run, each takes its own samples that way; see
`graphprune.streaming.sharing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import Batch
from graphprune.checkpoints.memory import page_out
from graphprune.errors import PlanError
from graphprune.ranks.group import current
from graphprune.streaming.core.adapter import GraphAdapter, Options, Sighting, StreamedModel
from graphprune.streaming.core.cache import nbytes
from graphprune.streaming.core.checkpoint import State
from graphprune.streaming.core.observer import Numbered, Observer, show, tell_gaps
from graphprune.streaming.core.padding import Padding
from graphprune.streaming.core.sites import Group, Sites
from graphprune.streaming.core.treatment import Recording, Separable, Step, Treatment
from graphprune.streaming.core.weights import TreatedWeights, holds
from graphprune.streaming.sharing import Seen, Work, look, own_batches


class Run:
    """One streamed run."""

    def __init__(
        self,
        program: BaseProgram,
        adapter: GraphAdapter,
        sites: Sites,
        batches: Sequence[Batch],
        treatment: Treatment | Separable,
        options: Options,
        state: State | None,
    ) -> None:
        """A run; see `graphprune.streaming.stream`. `adapter` is that of the program."""
        if not batches:
            raise PlanError("there is no calibration data", hint="give at least one sample")
        self.ranks = current()
        self.program = program
        self.groups = sites.groups
        self.numbers = own_batches(self.ranks, batches)
        self.batches = [batches[n] for n in self.numbers]
        self.treatment = treatment
        self.dtype = options.dtype
        self.placement = options.placement
        self.treated = TreatedWeights(program)
        # A process without samples runs none, but a model is made of some.
        given = self.batches or batches[:1]
        self.models: Sequence[StreamedModel] = ()
        self.ranks.agree(lambda: self._make_models(adapter, sites, given, options))
        self.padding = Padding(program)
        self.biases = adapter.find_biases(sites.all.values())
        self.observers: dict[int, list[Observer]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.state = state
        self.done = 0
        if state is not None:
            settings = options.settings()
            self.done = self.ranks.first(
                lambda: state.begin(program, self.groups, batches, settings)
            )
        self.solving = False
        self.reached = self.done
        self.earlier: Run | None = None

    def follow(self, earlier: Run) -> None:
        """Go on from the group where a run with other batches has stopped."""
        self.state, self.earlier = earlier.state, earlier
        self.done = self.reached = earlier.reached

    def _make_models(
        self, adapter: GraphAdapter, sites: Sites, batches: Sequence[Batch], options: Options
    ) -> None:
        self.models = adapter.models(sites, batches, self.treated, options)

    def treat(self, progress: Callable[[Step], None]) -> TreatedWeights:
        """Go through all groups."""
        for group in self.groups[self._restore() :]:
            restored = group.index < self.done
            seen = self.ranks.agree(lambda g=group: self._calibrate(g))  # type: ignore[misc]
            tokens = tuple(map(sum, zip(*([n for n, _ in one] for one in seen), strict=True)))
            if restored:
                self._take(group)
            else:
                self._treat(group, seen)
                self._save(group)
                self.reached = group.index + 1
            progress(self._step(group, tokens, restored))
        if self.state is not None and self.done < len(self.groups) and self.ranks.lead:
            self.state.finish()
        return self.treated

    def _calibrate(self, group: Group) -> Seen:
        """Run all batches up to a group's barrier, the models in step from probe to probe."""
        for number, batch in enumerate(self.batches):
            models = [model.forward(group.index, number) for model in self.models]
            for sightings in zip(*models, strict=True):
                if sightings[0].probe.group.index >= self.done:
                    self._observe(number, batch, sightings)
        for model in self.models:
            model.cache.settle(model.held(group.index))
            model.forget()
        if group.index < self.done:
            return []
        return look(self.ranks, group, self._observers(group), self.tokens[group.index])

    def _observers(self, group: Group) -> list[Observer]:
        """The observers of a group's parts, made when they are first asked for."""
        if group.index not in self.observers:
            parts = range(group.parts)
            self.observers[group.index] = [self.treatment.observer(group, p) for p in parts]
            self.tokens[group.index] = [0] * group.parts
        return self.observers[group.index]

    def _observe(self, number: int, batch: Batch, sightings: Sequence[Sighting]) -> None:
        """Show a value to the statistic of its group; each model has a sighting of it."""
        seen, site = sightings[0], sightings[0].probe.site
        # The sites of a masked model aren't those that a treatment knows.
        group = self.groups[seen.probe.group.index]
        observers, tokens = self._observers(group), self.tokens[group.index]
        x = self._wide(seen.value(site.reads))
        chosen = None if site.chosen is None else seen.value(site.chosen)
        valid = self.padding.rows(site, x, batch.valid)
        for part, rows in site.layout.rows(x, chosen, valid):
            if not len(rows):
                continue
            observer = observers[part]
            if isinstance(observer, Numbered):
                observer.begin(self.numbers[number])
            if not show(observer, rows):
                raise self.models[0].not_finite(site, number, seen.place)
            tokens[part] += len(rows)
        # Tokens may have chosen other experts in the dense model: their rows don't correspond.
        if len(sightings) > 1 and chosen is None:
            tell_gaps(observers, sightings, self.models[1].stored, self._wide, valid)

    def _wide(self, x: Tensor) -> Tensor:
        """A value in the dtype of statistics, or its own if that is wider."""
        return x.to(torch.promote_types(x.dtype, self.dtype))

    def _treat(self, group: Group, seen: Sequence[Seen]) -> None:
        """Have the weights of a group changed, one at a time."""
        self.solving = True
        names = self._own(group)
        weights = self.treated.lazily(names, self.placement)
        observers = self.observers[group.index]
        work = Work.dealt(self.ranks, self.treatment, group, self.program.parameters)
        work.add_up(observers, seen)
        for name, weight in work.solve(observers, weights):
            self.treated.take(names, name, weight)
            del weight
            page_out(self.program.weights[name])
        self.solving = False

    def _step(self, group: Group, tokens: tuple[int, ...], restored: bool) -> Step:
        """What is told of a group that is done, whose statistic is let go."""
        self.observers.pop(group.index, None)
        self.tokens.pop(group.index, None)
        held = self.models[0].held(group.index)
        memory = nbytes(values for model in self.models for values in model.cache.entries())
        return Step(group, len(self.groups), tokens, held, memory, restored)

    def _own(self, group: Group) -> tuple[str, ...]:
        """The weights of a group and their biases."""
        own = (self.biases.get(name) for name in group.parameters)
        return (*group.parameters, *(name for name in own if name is not None))

    def _save(self, group: Group) -> None:
        """Save the new weights, and the activations where no statistic is half done.

        The activations of several processes aren't brought together for it.
        """
        state = self.state
        if state is None:
            return
        changed = {n: self.treated[n] for n in self._own(group) if n in self.treated}
        record = self.treatment.record(group) if isinstance(self.treatment, Recording) else None

        def save() -> Path:
            return state.save_weights(group.index, changed, record)

        self._let_go(self.ranks.first(save), changed)
        if self.ranks.lead:
            alone = self.ranks.world == 1 and self.earlier is None
            whole = alone and self.observers.keys() <= {group.index}
            state.commit(group.index, self._saved if whole else None)

    def _let_go(self, file: Path, weights: Mapping[str, Tensor]) -> None:
        """Use the weights of a file in place of those in memory, where this process sees it."""
        if self.ranks.lead or holds(file, weights):
            self.treated.take_file(file)

    def _saved(self) -> list[Mapping[str, Any]]:
        return [values for model in self.models for values in model.saved()]

    def _take(self, group: Group) -> None:
        """Take the new weights of a group from an earlier run, or an interrupted one's files."""
        if self.earlier is not None:
            self.treated.take_from(self.earlier.treated, self._own(group))
            return
        state, names = self.state, self._own(group)
        assert state is not None

        def read() -> tuple[Path, Any]:
            file = state.weights_file(group.index)
            self.treated.take_file(file)
            return file, state.record_of(group.index)

        file, record = self.ranks.first(read)
        if self.ranks.world > 1:
            weights = {n: self.treated[n] for n in names if n in self.treated}
            weights = self.ranks.broadcast(0, weights)
            for name, weight in weights.items() if not self.ranks.lead else ():
                self.treated.take(names, name, weight)
            self._let_go(file, weights)
        if isinstance(self.treatment, Recording):
            self.treatment.recall(group, record)

    def _restore(self) -> int:
        """Take up what an interrupted run has saved; the first group that has to be reached."""
        if self.state is None or self.earlier is not None:
            return 0
        if self.done == len(self.groups):
            first = self.done
        elif self.ranks.world > 1 or (found := self.state.load_values()) is None:
            first = 0
        else:
            first, saved = found[0] + 1, iter(found[1])
            for model in self.models:
                model.restore(found[0], saved)
        for group in self.groups[:first]:
            self._take(group)
        return first
