"""What gates are to reach: which structures lose units, and how many."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError, RecipeError
from graphprune.ir.torch.program import Program
from graphprune.passes.protocol import State
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.budget import RESOURCES, parse_target
from graphprune.passes.selection.levers import GlobalLever
from graphprune.passes.selection.rank import rank
from graphprune.passes.selection.scope import Scope
from graphprune.passes.selection.select import select
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Inputs, Score
from graphprune.pipeline.steps.traced import as_traced
from graphprune.plan.kept import rows_of
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.recipe.mistakes import explain
from graphprune.recipe.selection import Selection
from graphprune.training.gated import Solve
from graphprune.training.gates.expected import Budget, Resource
from graphprune.training.gates.gates import Gated


def parse_goal(name: str, given: Mapping[str, Any]) -> Selection:
    """A goal with its options, checked as those of ``select``.

    Args:
        name: of the pass that has it, for messages.
        given: options of `Selection` that aren't as by default.

    Raises:
        RecipeError: one is no option or out of its range, or there is not one goal.
    """
    try:
        return Selection.model_validate({**given, "score": "magnitude"})
    except ValidationError as error:
        mistake = explain(error.errors()[0], Selection)
        raise RecipeError(mistake.replace("select has", f"{name} has")) from None


@dataclass(frozen=True)
class Goal:
    """What a pass is to reach by gates.

    Attributes:
        name: of the pass.
        selection: the goal, which structures stay whole, floors, and whether every structure of a
            role loses as much.
        score: name of the score in whose order gates begin; None for no order.
    """

    name: str
    selection: Selection
    score: str | None = None

    @classmethod
    def of(cls, name: str, score: str | None = None, **given: Any) -> Goal:
        """A goal of options as recipes have them; None is left out.

        Raises:
            RecipeError: see `parse_goal`.
        """
        plain: dict[str, Any] = {"exclude": (), "minimum": 1, "uniform": True}
        changed = {n: v for n, v in given.items() if v is not None and v != plain.get(n)}
        return cls(name, parse_goal(name, changed), score)

    @property
    def uniform(self) -> bool:
        """Whether every structure of a role loses as much."""
        return self.selection.uniform

    @property
    def _given(self) -> dict[str, Any]:
        return {name: goal for name, goal in self.selection.goals.items() if goal is not None}

    def program(self, state: State) -> Program:
        """The program of a state, of which no structure has gone yet.

        Raises:
            PlanError: some have, or it is an ONNX graph.
        """
        if state.plan.kept_units:
            raise PlanError(
                f"{self.name} begins with the whole model",
                why="an earlier step removes units",
                hint="put it first, or give it all that is to go",
            )
        return as_traced(state.program, self.name)

    def plan(self, program: Program, seed: int, score: Score | None = None) -> Plan:
        """A plan of units by a score; without one of units that are drawn.

        Raises:
            PlanError: the goal can't be reached.
        """
        return select(
            program, **self._given, score=score or Random(), exclude=self.selection.exclude,
            minimum=self.selection.minimum, uniform=self.uniform, normalize="none", seed=seed,
            notes=[],
        )  # fmt: skip

    def size(self, program: Program, seed: int) -> int:
        """The parameters of a model that has reached it."""
        selection = self.plan(program, seed).bind(program)
        blocks = [b for own in selection.cuts.values() for b in own]
        return program.costs.of(selection.keep, blocks).params

    def gated(self, program: Program, seed: int, data: Any = None) -> list[Gated]:
        """The structures that may lose units; with scores where there is data.

        Where some may lose more than others, those that may lose any have gates, and the numbers
        are those of a trial.
        """
        asked = _Asked()
        plan = self.plan(program, seed, asked)
        scope = self._scope(program)
        names = plan.kept_units if self.uniform else asked.names
        structures = [s for s in program.by_name.values() if s.name in names]
        scores = {} if data is None else self._scores(program, structures, seed, data)
        return [
            Gated(
                s,
                1 if s.within is None else s.within.size,
                kept_in_row(plan, s),
                scope.candidate(s).removable,
                scores.get(s.name),
            )
            for s in structures
        ]

    def solver(self, program: Program, seed: int, *, together: bool = False) -> Solve:
        """How many units of each structure stay, by how open their gates are.

        Args:
            program: the dense program.
            seed: see `plan`.
            together: whether the units of all roles of a budget go in one order; otherwise those of
                each role do, and all roles lose the same share.
        """

        def solve(scores: Mapping[str, FloatArray]) -> dict[str, int]:
            if together and self.selection.target is not None:
                return self._in_one_order(program, scores)
            plan = self.plan(program, seed, Known(scores))
            return {name: kept_in_row(plan, program.by_name[name]) for name in scores}

        return solve

    def budget(self, program: Program) -> Budget | None:
        """What the whole model may cost, if that is the goal and structures may lose unevenly."""
        if self.selection.target is None or self.uniform:
            return None
        dense = program.costs.total()
        resource, budget = parse_target(self.selection.target, dense)
        return Budget(cast("Resource", resource), 1 - budget / RESOURCES[resource](dense))

    def _in_one_order(self, program: Program, scores: Mapping[str, FloatArray]) -> dict[str, int]:
        assert self.selection.target is not None
        scope = self._scope(program)
        candidates = [scope.candidate(program.by_name[name]) for name in scores]
        means = Known({name: own / len(own) for name, own in scores.items()})  # over rows
        found = means.score(program, [c.structure for c in candidates], Inputs())
        ranked = {
            c.structure.name: rank(
                c.structure, found[c.structure.name], normalize="none", removable=c.removable
            )
            for c in candidates
        }
        lever = GlobalLever.of(candidates, ranked)
        resource, budget = parse_target(self.selection.target, program.costs.total())

        def fits(steps: int) -> bool:
            counts = lever.at(steps)
            units = {n: ranked[n].kept(k) for n, k in counts.items() if k < len(ranked[n].price)}
            selection = Plan(program.fingerprint, units).bind(program)
            blocks = [b for own in selection.cuts.values() for b in own]
            return RESOURCES[resource](program.costs.of(selection.keep, blocks)) <= budget

        if not fits(lever.steps):
            raise PlanError(
                f"the budget of {budget:,} {resource} is not reachable",
                why="the structures that have gates, and their floors, leave more",
                hint="ask for less, or lower minimum",
            )
        return lever.at(bisect_left(range(lever.steps), True, key=fits))

    def check_budget(self, program: Program, plan: Plan) -> None:
        """See that a budget is kept, whichever layers have gone.

        Raises:
            PlanError: it isn't.
        """
        if self.selection.target is None:
            return
        resource, budget = parse_target(self.selection.target, program.costs.total())
        selection = plan.bind(program)
        blocks = [b for own in selection.cuts.values() for b in own]
        cost = RESOURCES[resource](program.costs.of(selection.keep, blocks))
        if cost > budget:
            raise PlanError(
                f"the units that stay have {cost:,} {resource}, and the budget is {budget:,}",
                why="layers of different sizes are to go, and the smaller ones went",
                hint="give shape, or remove, in place of target",
            )

    def _scope(self, program: Program) -> Scope:
        return Scope(program, self.selection.exclude, (), self.selection.minimum)

    def _scores(
        self, program: Program, structures: list[Structure], seed: int, data: Any
    ) -> dict[str, FloatArray]:
        """The scores of all units that can be judged, ``[rows, size]``."""
        if self.score is None:
            return {}
        score = get_score(self.score)
        unknown = unjudged(score, program)
        judged = [s for s in structures if s.name not in unknown]
        found = score.score(program, judged, Inputs(data, None, seed))
        return {s.name: found[s.name].sum(axis=0).reshape(-1, s.size) for s in judged}


@dataclass(frozen=True)
class Known:
    """Scores that there are already.

    Attributes:
        scores: ``[rows, size]`` by structure.
    """

    scores: Mapping[str, FloatArray]

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        del program, inputs
        return {
            s.name: self.scores[s.name] if s.within is None else self.scores[s.name][None]
            for s in structures
        }


class _Asked:
    """Random scores, and which structures were asked about."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`; see `graphprune.passes.shared.score.Score`."""
        self.names.update(s.name for s in structures)
        return Random().score(program, structures, inputs)


def kept_in_row(plan: Plan, structure: Structure) -> int:
    """How many units of each row of a structure stay."""
    if structure.name not in plan.kept_units:
        return structure.size
    return len(rows_of(plan.kept_units[structure.name])[0])
