"""The pass ``repair``: the weights that read what goes make up for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphprune.calibration.sources.amounts import REPAIRS, Amount
from graphprune.passes.protocol import Context, Record, State
from graphprune.passes.repair.structured import read_by
from graphprune.pipeline.steps.told import each_group
from graphprune.plan.plan import Plan
from graphprune.recipe.named import UNREPAIRED, Repairing
from graphprune.report.masks import Refits


@dataclass(frozen=True)
class Repair:
    """Refit weights for the plan that earlier passes have made.

    It takes the place of earlier refits, of surgery too: they are no part of what it fits to.

    Attributes:
        options: the repair and its options.
    """

    options: Repairing

    @property
    def amount(self) -> Amount | None:
        """How much data it takes."""
        return REPAIRS if self.options.needs_data else None

    def check(self, state: State, context: Context) -> None:
        """See that a plan that is known already can be made up for.

        Raises:
            GraphPruneError: it can't.
        """
        if self._repairs(state.plan):
            check = getattr(self.options.built(), "check", None)
            if check is not None:
                check(state.program, state.plan)

    def run(self, state: State, context: Context) -> State:
        """Refit them.

        Raises:
            GraphPruneError: nothing can be made up for.
        """
        if not self._repairs(state.plan):
            return state.recorded(Record("repair"))
        if "repair" in context.open and not _may_help(state):
            note = "no layer refitted: no weight multiplies by what goes"
            return state.recorded(Record("repair", (note,)))
        data = context.samples(REPAIRS).data if self.options.needs_data else None
        with context.stage("repairing weights"):
            found = self.options.built().repair(
                state.base,
                data,
                state.plan,
                progress=each_group(context.progress, "repairing weights"),
                state=context.journal(),
            )
        details = Refits(self.options.name, found.layers) if found.layers else None
        record = Record("repair", found.notes, details)
        return replace(state, program=found.program, plan=found.plan, unfitted=state.base).recorded(
            record
        )

    def preview(self, state: State, context: Context) -> State:
        """Check what the run would do, whose plan is as large."""
        if not ("repair" in context.open and not _may_help(state)):
            self.check(state, context)
        return state

    def describe(self, state: State) -> str:
        """One line; "" where nothing goes."""
        if not self._repairs(state.plan):
            return ""
        return f"repair {len(read_by(state.program, state.plan))} layers by {self.options.name}"

    def _repairs(self, plan: Plan) -> bool:
        return self.options.name not in UNREPAIRED and bool(plan.kept_units)


def _may_help(state: State) -> bool:
    """Whether anything can make up for what a plan removes: what reads it, or what stays of layers.

    Whole layers are made up for by the others of their residual stream.
    """
    known = state.program.by_name
    layers = any(known[name].blocks for name in state.plan.kept_units)
    return layers or bool(read_by(state.program, state.plan))
