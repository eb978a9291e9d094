"""What a repair is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from graphprune.analysis.program import BaseProgram
from graphprune.passes.repair.structured import Repaired
from graphprune.plan.plan import Plan
from graphprune.streaming import State, Step


class Repair(Protocol):
    """Makes up for what a plan removes.

    A repair is a frozen dataclass whose fields are its options. One that looks at no calibration
    data says so by an attribute ``needs_data`` that is false, and gets no samples. One that takes
    the data through the model more than once has an attribute ``passes``, how often; one that may
    refuse a plan has a method ``check(program, plan)``, which is called before data is read.
    """

    def repair(
        self,
        program: BaseProgram,
        samples: Any,
        plan: Plan,
        *,
        progress: Callable[[Step], None] | None = None,
        state: State | None = None,
    ) -> Repaired:
        """The dense program with weights that suit a plan, each of which has an entry in `layers`.

        Args:
            program: the dense program; it isn't changed.
            samples: see `graphprune.streaming.batches`.
            plan: what stays.
            progress: see `graphprune.streaming.stream`.
            state: where progress is saved, and goes on from.

        Raises:
            GraphPruneError: nothing can be made up for.
        """
