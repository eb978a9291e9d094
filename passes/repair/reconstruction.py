"""The repair ``reconstruct``: weights that read what was cut are fitted anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from graphprune.analysis.program import BaseProgram
from graphprune.errors import RecipeError
from graphprune.passes.repair.structured import Repaired, reconstruct
from graphprune.plan.plan import Plan
from graphprune.streaming import State, Step


@dataclass(frozen=True)
class Reconstruction:
    """Fit by least squares to what the dense model computes.

    See `graphprune.passes.repair.structured.reconstruct`.

    Attributes:
        damping: of the Hessian, in units of the mean of its diagonal.
        reference: run the dense model along, and close the gap to it as well.
    """

    needs_data: ClassVar[bool] = True
    passes: ClassVar[int] = 2
    damping: float = 1e-4
    reference: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise RecipeError("reconstruct takes a damping from 0 to 1")

    def repair(
        self,
        program: BaseProgram,
        samples: Any,
        plan: Plan,
        *,
        progress: Callable[[Step], None] | None = None,
        state: State | None = None,
    ) -> Repaired:
        """Refit what reads the pruned axes; see `graphprune.passes.repair.protocol.Repair`."""
        return reconstruct(
            program,
            samples,
            plan,
            damping=self.damping,
            reference=self.reference,
            progress=progress,
            state=state,
        )
