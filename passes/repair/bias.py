"""The repair ``bias``: biases add what the removed units contribute on average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from graphprune.analysis.program import BaseProgram
from graphprune.frontends.hf.biases import with_biases
from graphprune.ir.torch.program import is_traced
from graphprune.passes.repair.structured import Repaired, compensate, read_by
from graphprune.plan.plan import Plan
from graphprune.streaming import State, Step


@dataclass(frozen=True)
class Bias:
    """FLAP's bias compensation; see `graphprune.passes.repair.structured.compensate`."""

    needs_data: ClassVar[bool] = True
    passes: ClassVar[int] = 1

    def check(self, program: BaseProgram, plan: Plan) -> None:
        """See that the model can have the biases.

        Raises:
            PlanError: its configuration can't hold them.
        """
        biased_for(program, plan)

    def repair(
        self,
        program: BaseProgram,
        samples: Any,
        plan: Plan,
        *,
        progress: Callable[[Step], None] | None = None,
        state: State | None = None,
    ) -> Repaired:
        """Move the biases of what reads the pruned axes; see `Repair`."""
        biased, moved = biased_for(program, plan)
        return compensate(biased, samples, moved, progress=progress, state=state)


def biased_for(program: BaseProgram, plan: Plan) -> tuple[BaseProgram, Plan]:
    """The program with biases, zero as yet, beside what a plan's structures are read by.

    Raises:
        PlanError: its configuration can't hold them.
    """
    if is_traced(program):
        program = with_biases(program, read_by(program, plan))
    return program, replace(plan, fingerprint=program.fingerprint)
