"""Choosing units while weights are refitted, and what stands in where that can't be done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.ir.torch.program import is_traced
from graphprune.passes.repair.structured import Repaired, obs
from graphprune.passes.repair.together import Size
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Inputs, Score
from graphprune.pipeline.steps.told import each_group
from graphprune.plan.kept import is_ragged
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.recipe.selection import Selection
from graphprune.solvers import Reconstruct
from graphprune.solvers.obs import Surgeon
from graphprune.streaming import State

OTHERWISE: Mapping[str, str] = {
    "layers": "block-influence",
    "attention_blocks": "block-influence",
    "mlp_blocks": "block-influence",
    "experts": "reap",
}
"""The score of the roles that surgery can't weigh, in a PyTorch model."""

Choose = Callable[[Any], Plan]


@dataclass(frozen=True)
class ByRole:
    """A score that asks another one for each structure.

    Attributes:
        scores: structure name to the name of its score.
        otherwise: for structures that have none.
        whole: structures that none can judge, to the reason.
    """

    scores: Mapping[str, str]
    otherwise: Score
    whole: Mapping[str, str] = field(default_factory=dict)

    def unjudged(self, program: BaseProgram, structures: Sequence[Structure]) -> dict[str, str]:
        """Structures that the score can't judge, to the reason."""
        return dict(self.whole)

    def score(
        self, program: BaseProgram, structures: Sequence[Structure], inputs: Inputs
    ) -> dict[str, FloatArray]:
        """Score every unit of `structures`."""
        found: dict[str, FloatArray] = {}
        names = dict.fromkeys(self.scores.get(s.name) for s in structures)
        for name in names:
            asked = [s for s in structures if self.scores.get(s.name) == name]
            score = self.otherwise if name is None else get_score(name)
            found |= score.score(program, asked, inputs)
        return found


def chosen_by_surgery(
    program: BaseProgram,
    options: Selection,
    samples: Any,
    choose: Choose,
    *,
    auto: bool,
    progress: Callable[[str], None],
    state: State | None,
) -> Repaired:
    """Choose the units of a goal by structured optimal brain surgery, and refit what reads them.

    Args:
        program: the dense program.
        options: the goal, with score obs.
        samples: see `graphprune.streaming.batches`.
        choose: makes the plan of the goal with a score.
        auto: whether roles that surgery can't weigh are left to other scores; otherwise they are
            an error.
        progress: told of each group of weights.
        state: where progress is saved.

    Raises:
        GraphPruneError: see `graphprune.passes.repair.structured.obs`.
    """
    size, plan = size_of(program, options, choose, auto=auto)
    if not size.keep:
        return Repaired(program, size.given or Plan(program.fingerprint, {}), (), {})
    surgeon, damping = surgeon_of(options)
    found = obs(
        program,
        samples,
        size.keep,
        given=size.given,
        surgeon=surgeon,
        damping=damping,
        progress=each_group(progress, "choosing units"),
        state=state,
    )
    return replace(found, plan=with_scores(program, found.plan, size, plan))


def size_of(
    program: BaseProgram, options: Selection, choose: Choose, *, auto: bool
) -> tuple[Size, Plan]:
    """How many units surgery has to leave of each structure; see `chosen_by_surgery`.

    Returns:
        It, and a plan of the same goal with the scores of what other scores choose.
    """
    # Where every structure of a role keeps as many units, counts don't depend on what they are.
    ranked: Score = Random() if options.uniform else get_score("obs")
    unread = unjudged(get_score("obs"), program)
    able = {s.name for s in program.structures if s.prunable and s.name not in unread}
    others = {name: otherwise(program, program.by_name[name].role) for name in unread}
    plan = choose(ByRole(others, ranked) if auto else ByRole({}, ranked, unread))
    keep = {
        name: len(units[0]) if is_ragged(units) else len(units)  # type: ignore[arg-type]
        for name, units in plan.kept_units.items()
        if name in able or not auto
    }
    rest = {name: units for name, units in plan.kept_units.items() if name not in keep}
    given = Plan(program.fingerprint, rest, {name: plan.sizes[name] for name in rest})
    gone = given.bind(program).removed_parameters
    for name in list(keep):  # what is in a layer that goes needs no choice
        if {program.aliases.get(p, p) for p, _ in program.by_name[name].members} <= gone:
            del keep[name]
    return Size(keep, given if rest else None), plan


def surgeon_of(options: Selection) -> tuple[Surgeon, float]:
    """How score obs chooses units, and how it damps."""
    own = options.score.model_extra or {}
    surgeon = Surgeon(steps=int(own.get("steps", Surgeon.steps)))
    return surgeon, float(own.get("damping", Reconstruct.damping))


def with_scores(program: BaseProgram, chosen: Plan, size: Size, plan: Plan) -> Plan:
    """What surgery has chosen, with the scores of what other scores did."""
    rest = () if size.given is None else size.given.kept_units
    return chosen.noted(
        program, {n: notes.scores for n, notes in plan.notes.items() if n in rest and notes.scores}
    )


def otherwise(program: BaseProgram, role: str) -> str:
    """The score that stands in for surgery where no weight multiplies by the units of a role.

    Gradients need a loss, which language models alone have, and what is none of the others' is left
    to the size of weights.
    """
    if not is_traced(program):
        return "magnitude"
    return OTHERWISE.get(role, "taylor" if program.is_causal else "magnitude")


def stood_in(program: BaseProgram, plan: Plan) -> tuple[str, ...]:
    """What to say of structures of a plan that were left to another score than obs, by role."""
    scores: dict[str, dict[str, None]] = {}
    for name in unjudged(get_score("obs"), program):
        if name in plan.kept_units:
            role = program.by_name[name].role
            scores.setdefault(otherwise(program, role), {})[role or "no role"] = None
    return tuple(
        f"{', '.join(roles)}: ranked by {score}, since obs can't weigh what no weight multiplies by"
        for score, roles in scores.items()
    )
