"""The pass ``select``: which units stay, by a score or by surgery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.sources.amounts import REPAIRS, SCORES, Amount
from graphprune.passes.protocol import Context, Record, State
from graphprune.passes.repair.structured import Repaired
from graphprune.passes.repair.together import Size
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.scope import Scope
from graphprune.passes.selection.select import check_goal, select
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Score
from graphprune.pipeline.steps.rounds import composed, interim_goal
from graphprune.pipeline.steps.surgery import ByRole, chosen_by_surgery, size_of, stood_in
from graphprune.plan.plan import Plan
from graphprune.plan.selector import named
from graphprune.recipe.named import AUTO
from graphprune.recipe.selection import Selection
from graphprune.report.masks import Refits
from graphprune.rewrite.apply import apply
from graphprune.rewrite.retrace import retrace


@dataclass(frozen=True)
class Select:
    """Choose units of what earlier passes have left.

    Attributes:
        options: the goal and the score.
        judge: a score that is ready, in place of that of the options.
        operated: what surgery has found already, if it was made for several goals together.
    """

    options: Selection
    judge: Score | None = None
    operated: Repaired | None = None

    @property
    def amount(self) -> Amount | None:
        """How much data it takes."""
        if self.options.operates:
            return REPAIRS
        return SCORES if self.options.score.needs_data else None

    def check(self, state: State, context: Context) -> None:
        """See that the goal means something here and can be reached.

        Raises:
            PlanError: a selector means nothing, the model has no such role, the goal is out of
                reach, or the score doesn't take its options.
        """
        options = self.options
        align: Mapping[str, int] | int = 1 if options.shape is not None else options.align
        whole: Mapping[str, str] = {}
        if options.score.name != AUTO:
            whole = unjudged(get_score(options.score.model_dump()), state.program)
        scope = Scope(
            state.program, options.exclude, options.include, options.minimum, align, whole
        )
        check_goal(scope, options.goals, uniform=options.uniform)

    def run(self, state: State, context: Context) -> State:
        """Choose; surgery refits weights as well."""
        return (
            self._operate(state, context) if self.options.operates else self.choose(state, context)
        )

    def choose(self, state: State, context: Context) -> State:
        """Choose by the score, and leave the weights alone."""
        data = None
        if self.options.score.needs_data:
            data = context.samples(SCORES).data
        notes: list[str] = []
        with context.stage(f"selecting{context.round.suffix}"):
            current, slim = state.program, None
            if state.plan.kept_units:
                slim = apply(state.program, state.plan)
                current = named(retrace(slim), self.options.names)
            plan = self._chosen(current, context, notes, data)
            plan = composed(slim, current, plan) if slim is not None else plan
        return replace(state, plan=plan).recorded(Record("select", tuple(notes)))

    def preview(self, state: State, context: Context) -> State:
        """Choose as the run does; by surgery only where sizes depend on what is chosen."""
        if self.options.operates:
            program = state.program
            whole = {} if "score" in context.open else unjudged(get_score("obs"), program)
            score = ByRole({}, Random(), whole)
            notes: list[str] = []
            plan = self._chosen(program, context, notes, None, score)
            if self._sizes_are_known(program, plan, context):
                return replace(state, plan=plan).recorded(Record("select", tuple(notes)))
        return self.run(state, context)

    def describe(self, state: State) -> str:
        """One line."""
        if self.options.operates:
            return "choose units by obs, and refit what reads them"
        return f"rank units by {self.options.score.name}"

    def _operate(self, state: State, context: Context) -> State:
        """Units chosen one by one, while what reads them is refitted."""
        notes: list[str] = []
        data = context.samples(REPAIRS).data
        if self.operated is not None:
            found = self.operated
        else:
            with context.stage("choosing units"):
                found = chosen_by_surgery(
                    state.program,
                    self.options,
                    data,
                    lambda score: self._chosen(state.program, context, notes, data, score),
                    auto="score" in context.open,
                    progress=context.progress,
                    state=context.journal(),
                )
        if "score" in context.open:
            notes += stood_in(state.program, found.plan)
        details = Refits("obs", found.layers) if found.layers else None
        record = Record("select", (*notes, *found.notes), details)
        return replace(state, program=found.program, plan=found.plan, unfitted=state.base).recorded(
            record
        )

    def size(self, state: State, context: Context) -> tuple[Size, Plan]:
        """What surgery has to leave; see `graphprune.pipeline.steps.surgery.size_of`."""
        data = context.samples(REPAIRS).data
        return size_of(
            state.program,
            self.options,
            lambda score: self._chosen(state.program, context, [], data, score),
            auto="score" in context.open,
        )

    def _sizes_are_known(self, program: BaseProgram, plan: Plan, context: Context) -> bool:
        """Whether a plan with any choice of units has the sizes that the real one will have.

        It has where every structure of a role keeps as many, and where the layers of a stack that
        loses some are alike. Masks name the weights of the layers that stay, so that these have to
        be known.
        """
        cut = [program.by_name[n] for n in plan.kept_units if program.by_name[n].blocks]
        alike = (len({program.costs.block(b) for b in stack.blocks}) == 1 for stack in cut)
        named = "sparsify" in context.ahead
        return self.options.uniform and (not cut or (not named and all(alike)))

    def _chosen(
        self,
        program: BaseProgram,
        context: Context,
        notes: list[str],
        calibration: Any = None,
        score: Score | None = None,
    ) -> Plan:
        """The units of a program that the goal of this round leaves."""
        options = self.options
        goal: Mapping[str, Any] = interim_goal(options, context.round, context.dense, program)
        return select(
            program,
            **goal,
            score=score or self.judge or options.score.model_dump(),
            exclude=options.exclude,
            include=options.include,
            uniform=options.uniform,
            align=options.align,
            minimum=options.minimum,
            aggregate=options.aggregate,
            normalize=options.normalize,
            seed=context.seed,
            calibration=calibration,
            notes=[],
            told=lambda note: notes.append(note) if note not in notes else None,
        )
