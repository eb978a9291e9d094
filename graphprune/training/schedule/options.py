"""How sparse a model is at each step of its training: options, and the cubic schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.options import listed, nearest, removed_fraction
from graphprune.solvers.pattern import NM
from graphprune.training.core.options import Count, Share

OwnScore: TypeAlias = Callable[[str, Tensor], Tensor]
"""A parameter's name and its weight to how much each of its elements matters."""

Removed = Annotated[float, BeforeValidator(removed_fraction)]
Globs = Annotated[tuple[str, ...], BeforeValidator(listed)]

_EVERY = 10
_EVENTS = 8


@dataclass(frozen=True)
class GradualPruning:
    """What to prune in the course of training, and when.

    The share of zeros rises as in Zhu and Gupta, To prune, or not to prune, 2017
    (arXiv:1710.01878): fast at first, where there is much to choose from, and slowly in the end.

    Attributes:
        sparsity: share of the chosen weights that is zero in the end; ``round(sparsity * count)``
            of them, exactly.
        pattern: "2:4" keeps two of every four inputs, in place of a sparsity.
        start: the share at the first step.
        initial: share of the steps before anything goes.
        final: share of the steps that train with all zeros in place.
        every: steps between two prunings; None for 10, or fewer where there would not be 8 of them.
        scope: weights that compete: those of a "layer", or all of them, "global".
        score: "magnitude", or a function of a parameter's name and its whole weight that gives a
            score for each element, of which the lowest go.
        include: globs of parameter names; None for the matrices of all layers but embeddings, the
            language model's head, depthwise convolutions and what has a single output.
        exclude: globs of parameters that stay dense.
    """

    sparsity: Removed | None = None
    pattern: str | None = None
    start: Removed = 0.0
    initial: Share = 0.1
    final: Share = 0.1
    every: Count | None = None
    scope: Literal["layer", "global"] = "layer"
    score: Literal["magnitude"] | OwnScore = "magnitude"
    include: Globs | None = None
    exclude: Globs = ()

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RecipeError: one is of another type or out of its range, or two contradict each other.
        """
        for field, adapter in _adapters().items():
            value = getattr(self, field)
            try:
                object.__setattr__(self, field, adapter.validate_python(value))
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                own = message.removeprefix("Value error, ")
                if own == message:
                    own = f"{message[:1].lower()}{message[1:]}, not {value!r}"
                raise RecipeError(f"pruning option '{field}': {own}") from None
        if (self.sparsity is None) == (self.pattern is None):
            raise RecipeError("gradual pruning takes a sparsity or a pattern, and one of them only")
        if self.initial + self.final > 1:
            raise RecipeError(
                "pruning would end before it begins",
                why=f"initial is {self.initial:g} of the steps, and final {self.final:g}",
                hint="let the two add up to 1 at most",
            )
        if self.start > self.target:
            raise RecipeError(
                "pruning can't begin with more zeros than it ends with",
                why=f"start is {self.start:g}, the end {self.target:g}",
            )

    @classmethod
    def of(cls, options: GradualPruning | Mapping[str, Any]) -> GradualPruning:
        """Options, or those that plain data say.

        Raises:
            RecipeError: an option is unknown, of another type or out of its range.
        """
        if isinstance(options, GradualPruning):
            return options
        known = tuple(field.name for field in fields(cls))
        for name in options:
            if name not in known:
                raise RecipeError(f"unknown pruning option '{name}'", hint=nearest(name, known))
        return cls(**options)

    @property
    def nm(self) -> NM | None:
        """The pattern n:m, if there is one.

        Raises:
            RecipeError: it is none.
        """
        if self.pattern is None:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if found is None:
            raise RecipeError(f"'{self.pattern}' is no pattern", hint="write 2:4")
        return NM(int(found[1]), int(found[2]), preserve=True)

    @property
    def target(self) -> float:
        """The share of zeros in the end, in whole groups where there is a pattern."""
        if (nm := self.nm) is not None:
            return 1 - nm.n / nm.m
        assert self.sparsity is not None
        return self.sparsity

    def sparsity_at(self, step: int, steps: int) -> float:
        """The share of zeros after a step.

        Args:
            step: steps done.
            steps: of the whole training.
        """
        begin, end = self.initial * steps, (1 - self.final) * steps
        if step >= end:
            return self.target
        past = max(0.0, (step - begin) / (end - begin))
        return self.target + (self.start - self.target) * (1 - past) ** 3

    def is_due(self, step: int, steps: int, seen: int = -1) -> bool:
        """Whether it is time to prune.

        Args:
            step: steps done.
            steps: of the whole training.
            seen: steps done when this was asked before; -1 for never.
        """
        begin, end = math.ceil(self.initial * steps), (1 - self.final) * steps
        if step >= end:
            return seen < end
        if step < begin:
            return self.start > 0 and seen < 0
        every = self.interval(steps)
        return seen < begin or (step - begin) // every > (seen - begin) // every

    def interval(self, steps: int) -> int:
        """Steps between two prunings."""
        if self.every is not None:
            return self.every
        rising = (1 - self.initial - self.final) * steps
        return max(1, min(_EVERY, int(rising / _EVENTS)))

    def to_json(self) -> dict[str, Any]:
        """The options as plain data, in which a function is its name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}
        score = self.score if isinstance(self.score, str) else _named(self.score)
        return {**found, "score": score}


def _named(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


@cache
def _adapters() -> dict[str, TypeAdapter[object]]:
    """What checks each option."""
    hints = get_type_hints(GradualPruning, include_extras=True)
    return {f.name: TypeAdapter(hints[f.name]) for f in fields(GradualPruning)}
