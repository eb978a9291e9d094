"""The streamed run: block by block, each on the inputs that the blocks before it give it now.

Both models run through the samples in step. The one that is trained gives a block its inputs, the
dense one what the block is to make of them: what the dense stream holds there. So every block makes
up for what those before it still lack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.digest import weights_digest
from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.passes.match.error import Errors
from graphprune.passes.match.options import Match
from graphprune.passes.match.pairs import Pair, pairs_of
from graphprune.passes.match.result import BlockStep, Matched, MatchedBlock
from graphprune.passes.match.sides import Side, Trained, pieces_of, sizes_of
from graphprune.passes.match.train import Lesson, Training
from graphprune.passes.match.zeros import check_masks, check_zeros
from graphprune.plan.plan import Plan
from graphprune.ranks.group import current
from graphprune.streaming import Group, State, Step, TreatedWeights, apply_weights, batches
from graphprune.streaming.identity import identity


def match(
    teacher: Program,
    student: Program,
    samples: Any,
    plan: Plan | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    options: Match | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Matched:
    """Train each block of a model on what the dense model's block computes.

    A block learns from the samples with what it has then, Adam and a cosine; held-out samples say
    whether what it learnt stays. All parameters are trained that the block alone reads: weights,
    biases and norms.

    Args:
        teacher: the dense program; it isn't changed.
        student: the same graph with other weights; it isn't changed.
        samples: see `graphprune.streaming.batches`; at least two.
        plan: what stays of the student, whose units that go take no part; None for all.
        masks: parameter to bool of its shape, False where a weight is zero and is to stay zero.
        options: how to train.
        dtype: of all floating computation.
        progress: told after each block, with a `BlockStep`.
        state: where progress is saved after each block, and goes on from; None saves nothing.

    Raises:
        PlanError: the graph has no residual blocks, or the samples, plan or masks don't fit.
        LoadError: `state` belongs to another run.
    """
    options = options or Match()
    if teacher.code() != student.code():
        raise PlanError(
            "two models of different graphs can't be matched",
            hint="give the dense program, and the same one with other weights",
        )
    plan = plan or Plan(student.fingerprint, {})
    if any(student.weights[n].is_meta for n in list(student.trainable)[:1]):
        raise PlanError(
            "there are no weights to train",
            why="the program was traced without them",
            hint="load the checkpoint with its weights",
        )
    data = batches(student, samples)
    if len(data) < 2:
        raise PlanError(
            "there is one sample, and some have to be held out",
            hint="give at least two samples: better some dozens",
        )
    check_masks(student, masks or {})

    def learn() -> tuple[dict[str, Tensor], tuple[MatchedBlock, ...], Mapping[str, str]]:
        run = _Run(teacher, student, plan, masks or {}, data, options, dtype, state)
        blocks = run.blocks(progress)
        return {name: run.new[name] for name in run.new}, blocks, run.skipped

    # Blocks are trained sample by sample: one process does it, and tells the others.
    new, blocks, skipped = current().first(learn)
    return Matched(apply_weights(student, new), blocks, skipped)


@dataclass(frozen=True)
class _Part:
    """A block, and where it lies.

    Attributes:
        pair: what it is trained on.
        start: where it begins in the graph that is trained.
        end: where it ends.
        wanted: the place in the dense graph where what it is to compute is known.
        parameters: what is trained, by its names in the graph that is trained.
    """

    pair: Pair
    start: int
    end: int
    wanted: int
    parameters: tuple[str, ...]


@dataclass
class _Clock:
    """Tells how long the rest takes."""

    begun: float = field(default_factory=time.monotonic)
    trained: int = 0

    def left(self, blocks: int) -> float | None:
        """Seconds for so many blocks."""
        if not self.trained:
            return None
        return (time.monotonic() - self.begun) / self.trained * blocks


class _Run:
    """One run."""

    def __init__(
        self,
        teacher: Program,
        student: Program,
        plan: Plan,
        masks: Mapping[str, Tensor],
        data: Sequence[Batch],
        options: Match,
        dtype: torch.dtype,
        state: State | None,
    ) -> None:
        self.program = student
        self.options = options
        self.data = data
        self.model = Trained.of(student, plan)
        pairs, self.skipped = pairs_of(student, plan.bind(student))
        sizes, held = sizes_of(student, data), getattr(torch, options.held)
        if dtype == torch.float64:
            held = dtype
        own = pieces_of(self.model, dtype, [p.exit for p in pairs])
        dense = pieces_of(teacher, dtype, [p.target for p in pairs])
        self.student = Side(own, data, held, sizes)
        self.teacher = Side(dense, data, held, sizes)
        self.errors = Errors(teacher, options.weigh)
        self.parts = self._parts(pairs)
        by_dense = {old: new for new, old in self.model.names.items()}
        known = {by_dense[n]: mask for n, mask in masks.items() if n in by_dense}
        self.masks = {n: self.model.cut(n, mask) for n, mask in known.items()}
        self.new = TreatedWeights(student)
        self.state = state
        self.done = 0
        self.groups = [Group(i, p.parameters, ()) for i, p in enumerate(self.parts)]
        if state is not None:
            told = [state.recipe, options, plan.kept_units, masks]
            self.state = replace(state, recipe=identity(told))
            settings = {"dtype": str(dtype), "student": weights_digest(student)}
            self.done = self.state.begin(teacher, self.groups, data, settings)

    def blocks(self, progress: Callable[[Step], None] | None) -> tuple[MatchedBlock, ...]:
        """Go through all blocks."""
        judging = self.options.judges(len(self.data))
        found: list[MatchedBlock] = []
        first, clock = self._restore(found), _Clock()
        for i, (group, part) in enumerate(zip(self.groups, self.parts, strict=True)):
            if i < first:
                continue
            self.student.advance(part.start)
            self.teacher.advance(part.wanted)
            restored = i < self.done
            block = self._take(group, part) if restored else self._train(i, part, judging)
            found.append(block)
            self.student.advance(part.end)
            if not restored:
                clock.trained += 1
                self._commit(i)
            if progress is not None:
                left = clock.left(len(self.parts) - i - 1)
                progress(self._step(group, restored, block, left))
        if self.state is not None:
            self.state.finish()
        return tuple(found)

    def _parts(self, pairs: Sequence[Pair]) -> list[_Part]:
        """The blocks in the order in which they run; those that overlap with one are left out."""
        own, dense = self.student.pieces, self.teacher.pieces
        found: list[_Part] = []
        for pair in sorted(pairs, key=lambda p: own.places[p.exit]):
            start, end = own.places[pair.entry] + 1, own.places[pair.exit] + 1
            wanted = dense.places[pair.target] + 1
            before = found[-1] if found else None
            names = tuple(n for n in self.model.names if own.read_between(n, start, end))
            if before is not None and (start < before.end or wanted < before.wanted):
                self.skipped[pair.path] = f"it overlaps with {before.pair.path}"
            elif not names:
                self.skipped[pair.path] = "it has no parameters of its own"
            else:
                found.append(_Part(pair, start, end, wanted, names))
        return found

    def _train(self, index: int, part: _Part, judging: frozenset[int]) -> MatchedBlock:
        """Train a block, and keep what it learnt if the samples that judge like it."""
        training = Training(self.student, part.pair, part.end, self.masks)
        lessons = [self._lesson(i, part.pair) for i in range(len(self.data))]
        judges = [one for one in lessons if one.sample in judging]
        before = after = training.judged(judges, {})
        new: dict[str, Tensor] = {}
        if not math.isfinite(before):
            raise PlanError(
                "the error of a block is not a finite number",
                where=part.pair.path,
                hint="look for NaN and infinity in the weights and samples",
            )
        if before > 0:  # a block without an error has nothing to learn
            rest = [one for one in lessons if one.sample not in judging]
            seed = self.options.seed + index
            new = training.learn(part.parameters, rest, self.options, seed)
            after = training.judged(judges, new)
        stays = after < before
        block = MatchedBlock(part.pair.path, self._dense(part), before, after, stays)
        self._keep(new if stays else {})
        if self.state is not None:
            record = {"before": before, "after": after, "stays": stays}
            self.state.save_weights(index, new if stays else {}, record)
        return block

    def _lesson(self, sample: int, pair: Pair) -> Lesson:
        def wanted() -> Tensor:  # as it is held: all together would be a third stream
            return self.errors.wanted(pair, self.teacher.value(sample, pair.target))

        weights = self.errors.weights(pair, wanted(), self.data[sample].valid)
        return Lesson(sample, wanted, weights)

    def _dense(self, part: _Part) -> tuple[str, ...]:
        return tuple(self.model.names[n] for n in part.parameters)

    def _keep(self, new: Mapping[str, Tensor]) -> None:
        """Take new weights into the model, and bring them to full size."""
        check_zeros(new, {n: self.masks[n] for n in new if n in self.masks})
        self.student.pieces.new = dict(new)  # nothing reads those of the blocks before any more
        self.student.pieces.forget()
        for name, weight in new.items():
            old = self.model.names[name]
            whole = self.model.whole(name, weight, self.program.weights[old])
            self.new.take((old,), old, whole)

    def _take(self, group: Group, part: _Part) -> MatchedBlock:
        """Take what an interrupted run made of a block."""
        assert self.state is not None
        file = TreatedWeights(self.program)
        file.take_file(self.state.weights_file(group.index))
        self._keep({n: file[n] for n in file})
        record = self.state.record_of(group.index)
        return MatchedBlock(part.pair.path, self._dense(part), **record)

    def _commit(self, index: int) -> None:
        if self.state is not None:
            self.state.commit(index, lambda: [*self.student.saved(), *self.teacher.saved()])

    def _restore(self, found: list[MatchedBlock]) -> int:
        """Take up saved activations; the first block that has still to be reached."""
        if self.state is None:
            return 0
        index, saved = self.done - 1, None
        if self.done < len(self.parts):
            loaded = self.state.load_values()
            if loaded is None:
                return 0
            index, saved = loaded
        for group, part in zip(self.groups[: index + 1], self.parts, strict=False):
            found.append(self._take(group, part))
        if saved is not None:
            half = len(saved) // 2  # both have as many samples and sizes
            self.student.restore(self.parts[index].end, saved[:half])
            self.teacher.restore(self.parts[index].wanted, saved[half:])
        return index + 1

    def _step(
        self, group: Group, restored: bool, block: MatchedBlock, left: float | None
    ) -> BlockStep:
        return BlockStep(
            group,
            len(self.groups),
            (),
            self.student.held_names(),
            self.student.held_bytes() + self.teacher.held_bytes(),
            restored,
            block,
            left,
        )


def _digest(masks: Mapping[str, Tensor]) -> str:
    """What tells masks apart."""
    return str({name: int(mask.sum()) for name, mask in sorted(masks.items())})
