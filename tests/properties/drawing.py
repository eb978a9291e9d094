"""Draws random recipes: instructions that fit the shapes of what was drawn before.

Choices come from an object like `random.Random`. hypothesis has one that shrinks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from properties import judges, macros, motifs, moves
from properties.recipe import Net, Recipe

LIMIT = 2500  # elements of a tensor
OTHER_BATCH = 7


class Misfit(Exception):
    """An instruction doesn't fit its operands; another one is drawn."""


class Drawing:
    """A recipe in the making, with the shapes of its values at two batch sizes.

    Attributes:
        rng: where choices come from.
        steps: the instructions so far.
        values: each value at the example's batch and at another one, on the meta device.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.net = Net(())
        self.inputs: list[tuple[Any, ...]] = []
        self.steps: list[tuple[Any, ...]] = []
        self.values: list[tuple[Any, Any]] = []
        self.used: set[int] = set()
        self.scale = rng.choice(
            [1.0, 1.0, 0.01, 0.1, 10.0, 100.0, round(10 ** rng.uniform(-2, 2), 2)]
        )
        self.reads_inputs = rng.randrange(6) == 0  # their axes are frozen: not too often
        self.plain = rng.randrange(6) == 0  # nothing but what `judge_zeroed` can judge
        self.excluded = rng.choice([judges.shifts, judges.sums])  # there
        self.biases = not self.plain or self.excluded is judges.sums

    def input(self, *given: Any) -> int:
        """Another input; its first dimension is the batch."""
        shape = given[2:] if given[0] == "ids" else given
        dtype = torch.int64 if given[0] == "ids" else torch.float32
        self.inputs.append(given)
        self.values.append(
            (
                torch.empty(shape, dtype=dtype, device="meta"),
                torch.empty((OTHER_BATCH, *shape[1:]), dtype=dtype, device="meta"),
            )
        )
        return len(self.values) - 1

    def add(self, name: str, operands: tuple[int, ...], *constants: Any) -> int:
        """Another instruction.

        Returns:
            The number of its value.

        Raises:
            Misfit: it fails, or its result is too large, empty or of a foreign kind.
        """
        step = (name, operands, *constants)
        index = len(self.steps)
        if self.plain:
            shapes = [self._shape(v) for v in operands]
            if self.excluded(step) or not judges.is_plain(step, shapes):
                raise Misfit(f"{step} notices zeros")
        try:
            with torch.no_grad(), torch.device("meta"):
                pair = tuple(
                    self.net.compute(index, step, [v[side] for v in self.values]) for side in (0, 1)
                )
            results = pair[0] if isinstance(pair[0], tuple) else (pair[0],)
            if any(not 0 < r.numel() <= LIMIT or r.dim() > 6 for r in results):
                raise Misfit(f"{[tuple(r.shape) for r in results]}")
        except Exception as error:
            for kind in "mwb":  # the next try makes its own
                if hasattr(self.net, f"{kind}{index}"):
                    delattr(self.net, f"{kind}{index}")
            raise Misfit(f"{step}: {error}") from error
        self.steps.append(step)
        self.values.append(pair)  # type: ignore[arg-type]
        self.used.update(operands)
        return len(self.values) - 1

    def shape(self, value: int) -> tuple[int, ...]:
        """Sizes of a value in the example."""
        return tuple(self.values[value][0].shape)

    def _shape(self, value: int) -> tuple[int, ...]:
        """Sizes of a value; none for several at once."""
        v = self.values[value][0]
        return tuple(v.shape) if isinstance(v, Tensor) else ()

    def fixed(self, value: int) -> list[int]:
        """The dimensions of a value that don't vary with the batch."""
        a, b = (v.shape for v in self.values[value])
        return [i for i in range(len(a)) if a[i] == b[i]]

    def choice(self, options: Sequence[Any]) -> Any:
        """One of them; a misfit where there is none."""
        if not options:
            raise Misfit("nothing to choose from")
        return self.rng.choice(options)

    def number(self, *bounds: int) -> int:
        """As `range` has it; a misfit where that is empty."""
        if not range(*bounds):
            raise Misfit("nothing to choose from")
        return self.rng.randrange(*bounds)

    def tensors(self, *ranks: int) -> list[int]:
        """Floating values of these ranks, or of any."""
        return [
            i
            for i, (v, _) in enumerate(self.values)
            if isinstance(v, Tensor)
            and v.is_floating_point()
            and (not ranks or v.dim() in ranks)
            and (i >= len(self.inputs) or self.reads_inputs)
        ]

    def pick(self, *ranks: int) -> int:
        """One of them, a late one more often than an early one."""
        found = self.tensors(*ranks)
        if not found:
            raise Misfit("no value of such a rank")
        back = min(self.number(len(found)), self.number(len(found)))
        if self.number(3):
            back = min(back, 2)
        return found[-1 - back]


def draw(rng: random.Random, most: int = 30) -> Recipe:
    """A random recipe of 3 to about `most` instructions."""
    d = Drawing(rng)
    batch = rng.choice([2, 3, 5])
    macros.inputs(d, batch)
    goal = 3 + min(rng.randrange(most - 2) for _ in range(3))  # small ones are found out sooner
    for _ in range(2 * goal):
        if len(d.steps) >= goal:
            break
        try:
            rng.choice(_MOVES)(d)
        except Misfit:
            continue
    outputs = _outputs(d)
    small = len(d.steps) <= 9  # symbolic sizes take many times as long
    dynamic = rng.randrange(4) == 3 and small
    return Recipe(tuple(d.inputs), tuple(d.steps), tuple(outputs), dynamic, d.scale)


def _outputs(d: Drawing) -> list[int]:
    """Up to six values that nothing reads, most of them behind a head that mixes their axes."""
    ends = [v for v in d.tensors() if v not in d.used] or d.tensors()[-1:]
    found = []
    for v in reversed(ends):
        for _ in range(d.choice([0, 1, 1, 1, 2, 2])):
            try:
                v = macros.head(d, v)
            except Misfit:
                break
        found.append(v)
        if len(found) == 6:
            break
    return found


_ALL = (*moves.WEIGHTED, *macros.WEIGHTED, *motifs.WEIGHTED)
_MOVES = [f for f, weight in _ALL for _ in range(weight)]
