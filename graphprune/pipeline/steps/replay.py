"""The pass ``replay``: units of a saved plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphprune.passes.protocol import Context, Record, State
from graphprune.plan.plan import Plan
from graphprune.recipe.steps import Replayed


@dataclass(frozen=True)
class Replay:
    """Take a plan that was saved.

    Attributes:
        options: where it is.
    """

    options: Replayed

    def check(self, state: State, context: Context) -> None:
        """See that the plan is one of this model.

        Raises:
            PlanError: it isn't.
        """
        Plan.load(self.options.plan).bind(state.program)

    def run(self, state: State, context: Context) -> State:
        """Load it."""
        return replace(state, plan=Plan.load(self.options.plan)).recorded(Record("replay"))

    preview = run
    choose = run

    def describe(self, state: State) -> str:
        """One line."""
        return f"take the plan {self.options.plan}"
