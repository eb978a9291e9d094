"""Training one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.passes.match.error import error
from graphprune.passes.match.options import Match
from graphprune.passes.match.pairs import Pair
from graphprune.passes.match.sides import Side
from graphprune.placement import present
from graphprune.training.core.zeros import fill_zeros

_STRIDE = 1_000_003
"""Between the seeds of two blocks, of which each has one for every epoch."""


@dataclass(frozen=True)
class Lesson:
    """What a block is to compute for one sample.

    Attributes:
        sample: its number.
        wanted: gives the dense model's value, as the block has it.
        weights: what the squared error of each token counts.
    """

    sample: int
    wanted: Callable[[], Tensor]
    weights: Tensor


@dataclass
class Training:
    """One block that is being trained.

    Attributes:
        side: the model; it waits where the block begins.
        pair: the block.
        end: the place where it ends.
        masks: parameter to bool, False where a weight is held at zero.
    """

    side: Side
    pair: Pair
    end: int
    masks: Mapping[str, Tensor]

    def learn(
        self, names: Sequence[str], lessons: Sequence[Lesson], options: Match, seed: int
    ) -> dict[str, Tensor]:
        """Train some parameters; the model is left as it was.

        Args:
            names: of the parameters.
            lessons: the samples to learn from.
            options: how.
            seed: of the order of the samples.

        Returns:
            The trained parameters in the types that they are stored in.
        """
        pieces = self.side.pieces
        held = {n: present().bring(~self.masks[n]) for n in names if n in self.masks}
        stored = {n: pieces.stored(n) for n in names}
        leaves = {n: _leaf(present().bring(w), pieces.dtype) for n, w in stored.items()}
        optimiser = torch.optim.Adam(leaves.values(), lr=options.lr, fused=True)
        steps, step = options.epochs * len(lessons), 0
        pieces.trained = leaves
        try:
            for epoch in range(options.epochs):
                order = torch.Generator().manual_seed(seed * _STRIDE + epoch)
                for i in torch.randperm(len(lessons), generator=order).tolist():
                    for group in optimiser.param_groups:
                        group["lr"] = options.lr * (1 + math.cos(math.pi * step / steps)) / 2
                    optimiser.zero_grad(set_to_none=True)
                    with torch.enable_grad():
                        found, tokens = self._error(lessons[i])
                        if tokens:
                            self._backward(found / tokens)
                    if tokens:
                        optimiser.step()
                        self._hold(leaves, held)
                    step += 1
        finally:
            pieces.trained = {}
        return {n: w.detach().to(stored[n]) for n, w in leaves.items()}

    def judged(self, lessons: Sequence[Lesson], new: Mapping[str, Tensor]) -> float:
        """The mean error of the block's tokens with some new weights; the model stays as it was."""
        pieces = self.side.pieces
        before = pieces.new
        pieces.new = {**before, **new}
        pieces.forget()
        try:
            with torch.no_grad():
                found = [self._error(one) for one in lessons]
        finally:
            pieces.new = before
            pieces.forget()
        tokens = sum(count for _, count in found)
        if not tokens:
            raise PlanError(
                "the held-out samples are nothing but padding",
                where=self.pair.path,
                hint="give more samples",
            )
        return float(sum(one.double() for one, _ in found) / tokens)

    def _error(self, lesson: Lesson) -> tuple[Tensor, int]:
        pieces = self.side.pieces
        values = self.side.run(lesson.sample, self.end)
        found = values[pieces.nodes[pieces.places[self.pair.exit]]]
        tokens = int(lesson.weights.count_nonzero())
        return error(found, lesson.wanted(), self.pair.features, lesson.weights), tokens

    def _backward(self, loss: Tensor) -> None:
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as problem:
            if "derivative" not in str(problem):
                raise
            raise PlanError(
                "a block can't be trained: an operator has no derivative",
                where=self.pair.path,
                why=str(problem),
                hint="leave block matching out",
            ) from problem

    @staticmethod
    def _hold(leaves: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        for name, gone in held.items():
            fill_zeros(leaves[name], ~gone)


def _leaf(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that can be trained, in order of its elements, as the fused optimiser takes it."""
    copied = weight.to(dtype).clone(memory_format=torch.contiguous_format)
    return copied.requires_grad_()
