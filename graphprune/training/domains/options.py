"""How the shares of domains follow their losses, as recipes say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from graphprune.errors import RecipeError
from graphprune.training.core.options import Count, NotNegative, Share
from graphprune.training.domains.order import Exhausted
from graphprune.training.domains.shares import Rule

DENSE = "dense"
"""The losses of the dense model as references."""


@dataclass(frozen=True)
class Domains:
    """Dynamic batch loading: a domain that is behind its reference loss gets more of each batch.

    Attributes:
        reference: the losses that are aimed at: "dense" for those of the dense model, numbers by
            domain or in their order, ``{sizes: [...], losses: {domain: [...]}}`` of other models
            for a scaling law, or the path of a JSON file of one of these.
        shares: name to the share that each domain begins with; None for those of the data.
        held_out: share of each domain's windows that losses are measured on; they aren't trained
            on.
        every: steps between two measurements.
        rule: the "paper"'s, or that of its "code".
        step_size: how fast shares follow.
        floor: the least share of each domain.
        exhausted: what becomes of a domain that has no more windows: "repeat", "renormalise" or
            "stop".
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    reference: Any = DENSE
    shares: Mapping[str, NotNegative] | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    every: Count = 50
    rule: Rule = "paper"
    step_size: NotNegative = 1.0
    floor: Share = 0.0
    exhausted: Exhausted = "repeat"

    def __post_init__(self) -> None:
        """See that the reference is one.

        Raises:
            RecipeError: it is something else.
        """
        known = isinstance(self.reference, str | list | tuple | Mapping)
        if not known or not self.reference:
            raise RecipeError(
                f"{self.reference!r} are no reference losses of domains",
                hint="give dense, numbers by domain, or the path of a JSON file of them",
            )
