"""Selection: from a goal and a score to a plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Block, Structure
from graphprune.errors import PlanError
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.selection.budget import (
    RESOURCES,
    Measure,
    budget_roles,
    check_reach,
    fit,
    parse_target,
    without_coarse,
)
from graphprune.passes.selection.coupled import counted_once
from graphprune.passes.selection.levers import Counts, Lever, levers
from graphprune.passes.selection.rank import AGGREGATES, SCALES, Ranked, check_option, rank
from graphprune.passes.selection.rounding import Pull, budget_notes, removal_notes
from graphprune.passes.selection.scope import ALL, Candidate, Scope
from graphprune.passes.selection.shape import shape_counts
from graphprune.passes.selection.whole import kept_whole
from graphprune.passes.shared.choice import Choice, Chooser
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.room import score_on_device
from graphprune.passes.shared.score import Inputs, Loss, Score
from graphprune.plan.notes import ScoreSummary
from graphprune.plan.plan import Plan
from graphprune.plan.selector import bind_all, named


def select(
    program: BaseProgram,
    remove: Mapping[str, float] | None = None,
    target: Mapping[str, int | float] | None = None,
    shape: Mapping[str, int] | None = None,
    score: str | Mapping[str, Any] | Score = "magnitude",
    *,
    names: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    uniform: bool = True,
    align: int | str | Mapping[str, int | str] = 1,
    minimum: int | float = 1,
    aggregate: str = "sum",
    normalize: str = "mean",
    seed: int = 0,
    calibration: Any = None,
    loss: Loss | None = None,
    ragged: bool = True,
    roles: Sequence[str] | None = None,
    notes: list[str] | None = None,
    told: Callable[[str], None] | None = None,
) -> Plan:
    """Choose which units stay. Exactly one of `remove`, `target` and `shape` is given.

    Args:
        program: the program.
        remove: role to the fraction of the units of each of its structures to remove, of all layers
            in a stack, whichever have to stay; counts round to nearest, half up. Of structures
            that multiply (groups of channels) one loses units; see
            `graphprune.passes.selection.coupled`. ``*`` stands for every prunable role that is not
            named; ``heads`` for kv_heads, or for query_heads in a model without them. A selector
            such as ``model.layers.[4-9].*/ffn`` (see `graphprune.plan.selector`) instead of a role
            sets the fraction of what it means, which the entry of the role then leaves alone.
        target: ``{"params": x}``, ``{"macs": x}`` or ``{"bytes": x}``, x a fraction of the dense
            model (at most 1) or a whole number. It is never exceeded; where align, floors or equal
            widths allow no size within 0.5 % below it, the nearest below is taken.
        shape: role to exact size; see `graphprune.passes.selection.shape.shape_counts`.
        score: a name, a mapping of ``name`` and options, or a score.
        names: selector to a role of one's own for the structures that it means; see
            `graphprune.plan.selector.named`.
        exclude: structures that one of these selectors means stay whole: ``model.layers.0.*`` by
            parameter, ``lm_head.weight:1`` by dimension, ``model.layers.[0-3].*/ffn`` by role. In
            a stack of layers, those layers stay that own such a parameter.
        include: if given, only structures (layers) that one of these selectors means are pruned.
        uniform: True removes the same fraction from every structure of a role. False ranks their
            units together, by normalised scores.
        align: kept sizes are multiples of this, in positions of a dimension, by role or for all
            widths (heads, layers and experts have to be named); the nearest multiple is taken, or
            the whole. A number, or gpu, ort or gguf: see `graphprune.passes.selection.alignment`.
        minimum: units that stay in every structure, or the fraction of them (below 1).
        aggregate: how the scores of a unit's members are joined: sum, mean, max, prod, last.
        normalize: what a structure's scores are divided by: none, or their mean, max, sum.
        seed: of score random.
        calibration: data for scores that need it; see `graphprune.passes.shared.score.Inputs`.
        loss: see `graphprune.passes.shared.score.Inputs`.
        ragged: let every outer unit keep its own inner units, in equal numbers, where the model
            allows it (query heads of a key-value head).
        roles: those that take part in a `target`. None takes ffn, heads, channels and experts, or
            whatever widths a model without these has.
        notes: receives what became of a goal that no size meets exactly; None warns of a budget.
        told: told which structures stay whole because the score can't judge them; None warns.

    Raises:
        PlanError: the goal is unknown, contradictory or out of reach; the message says what is.
    """
    check_option("aggregate", aggregate, AGGREGATES)
    check_option("normalize", normalize, SCALES)
    goals = {"remove": remove, "target": target, "shape": shape}
    given = [name for name, goal in goals.items() if goal is not None]
    if len(given) != 1:
        raise PlanError(
            "a selection has exactly one of remove, target, shape",
            why=f"this one has {' and '.join(given) or 'none'}",
        )
    if roles is not None and target is None:
        raise PlanError("roles= belongs to a target", hint="name roles as keys of remove or shape")
    program = named(program, names or {})
    found = get_score(score)
    whole = unjudged(found, program)
    scope = Scope(program, exclude, include, minimum, 1 if shape is not None else align, whole)
    check_goal(scope, goals, uniform=uniform, roles=roles)
    options = {"aggregate": aggregate, "normalize": normalize, "ragged": ragged}
    ranking = _Ranking(scope, found, Inputs(calibration, loss, seed), options)
    pulls: list[Pull] = []
    if shape is not None:
        counts = shape_counts(scope, shape)
    elif remove is not None:
        pulls = _pulls(scope, ranking, remove, uniform)
        counts = _removed(pulls)
    else:
        counts = _budgeted(scope, ranking, target or {}, roles, uniform)
    known = program.by_name
    shrunk = [s for s in known.values() if counts.get(s.name, s.size) < s.size]
    note = kept_whole(scope, {s.role for s in shrunk})
    if note is not None and told is not None:
        told(note)
    elif note is not None:
        warnings.warn(note, stacklevel=2)
    chosen = ranking.choices(scope.candidate(s) for s in shrunk)
    if shrunk and _without_values(program, ranking.score):
        # Sizes and costs don't depend on which units stay, so that planning on shapes is useful.
        warnings.warn("the weights have no values (meta device): units tie, the first ones stay",
                      stacklevel=2)  # fmt: skip
    plan = Plan(
        program.fingerprint,
        {s.name: chosen[s.name].kept(counts[s.name]) for s in shrunk},
        {s.name: s.size for s in shrunk},
    )
    rounded = removal_notes(pulls) if target is None else budget_notes(scope, target, plan)
    if notes is not None:
        notes += rounded
    elif target is not None:
        for note in rounded:
            warnings.warn(note, stacklevel=2)
    return plan.noted(program, _summed_up(chosen, counts))


def _summed_up(chosen: Mapping[str, Choice], counts: Counts) -> dict[str, ScoreSummary]:
    """The scores of what was chosen by them; sets that a score chooses have none of their own."""
    return {
        name: ScoreSummary.of(choice.price, len(choice.price) - counts[name])
        for name, choice in chosen.items()
        if isinstance(choice, Ranked)
    }


def check_goal(
    scope: Scope,
    goals: Mapping[str, Mapping[str, Any] | None],
    *,
    uniform: bool = True,
    roles: Sequence[str] | None = None,
) -> None:
    """See that a goal can be reached, without weights or data.

    Args:
        scope: what may be touched.
        goals: remove, target or shape to what `select` takes for it, or None.
        uniform: see `select`.
        roles: see `select`.

    Raises:
        PlanError: it can't, a selector means nothing, or the model has no such role.
    """
    scope.check_selectors()
    anyhow = _anyhow(scope)
    remove, target, shape = (goals.get(name) for name in ("remove", "target", "shape"))
    if remove is not None:
        _removed(_pulls(scope, anyhow, remove, uniform))
    if shape is not None:
        shape_counts(scope, shape)
    if target is not None:
        resource, budget = parse_target(target, scope.program.costs.total())
        found = [c for role in budget_roles(scope, roles) for c in scope.candidates(role)]
        if not any(c.structure.blocks for c in found):  # layers may cost more or less
            check_reach(
                _levers(anyhow, found, True), _cost(scope, anyhow, resource), budget, resource
            )


def goal_notes(
    scope: Scope,
    goals: Mapping[str, Mapping[str, Any] | None],
    plan: Plan,
    *,
    uniform: bool = True,
) -> tuple[str, ...]:
    """What to say of a goal that no size meets exactly.

    Args:
        scope: what could be touched.
        goals: see `check_goal`.
        plan: what was made of them.
        uniform: see `select`.
    """
    remove, target = goals.get("remove"), goals.get("target")
    if target is not None:
        return budget_notes(scope, target, plan)
    return removal_notes(_pulls(scope, _anyhow(scope), remove, uniform)) if remove else ()


def _anyhow(scope: Scope) -> _Ranking:
    """A ranking for where counts don't depend on which units go."""
    options = {"aggregate": "sum", "normalize": "none", "ragged": True}
    return _Ranking(scope, Random(), Inputs(), options)


def _without_values(program: BaseProgram, score: Score) -> bool:
    names = (n for n in program.parameters if n in program.trainable)
    return not isinstance(score, Random) and program.weights[next(names)].is_meta


@dataclass(frozen=True)
class _Ranking:
    """Ranks structures when they are asked for, each once."""

    scope: Scope
    score: Score
    inputs: Inputs
    options: Mapping[str, Any]
    known: dict[str, Ranked] = field(default_factory=dict)
    chosen: dict[str, Choice | None] = field(default_factory=dict)

    def of(self, candidates: Iterable[Candidate]) -> dict[str, Ranked]:
        """The units of `candidates` in the order in which they go, by structure name."""
        new = [c for c in candidates if c.structure.name not in self.known]
        if new:
            program = self.scope.program
            scores = score_on_device(self.score, program, [c.structure for c in new], self.inputs)
            for c in new:
                name = c.structure.name
                self.known[name] = rank(
                    c.structure, scores[name], removable=c.removable, **self.options
                )
        return self.known

    def choices(self, candidates: Iterable[Candidate]) -> dict[str, Choice]:
        """What is to stay of each structure, by name: sets that the score chooses, or the best."""
        found, score = list(candidates), self.score
        for c in found:
            if isinstance(score, Chooser) and c.structure.name not in self.chosen:
                self.chosen[c.structure.name] = score.choose(
                    self.scope.program, c.structure, c.removable, self.inputs
                )
        sets = {name: choice for name, choice in self.chosen.items() if choice is not None}
        return {**self.of(c for c in found if c.structure.name not in sets), **sets}


def _removed(pulls: Iterable[Pull]) -> Counts:
    """Kept counts for a fraction per role or selector."""
    counts: Counts = {}
    for _, lever, fraction in pulls:
        counts |= lever.at(lever.nearest(fraction))
    return counts


def _pulls(
    scope: Scope, ranking: _Ranking, remove: Mapping[str, float], uniform: bool
) -> list[Pull]:
    """What is to shrink, in words, how it can, and by which fraction.

    A selector's structures are its own, and no role's.
    """
    fractions: dict[str, float] = {}
    pulls: list[Pull] = []
    claimed: dict[str, str] = {}
    for name, fraction in remove.items():
        if not 0 <= fraction < 1:
            raise PlanError(
                f"{fraction!r} is not a fraction to remove",
                where=f"remove {name}",
                hint="give a number of at least 0 and below 1",
            )
        if name == ALL or name.isidentifier():
            role = scope.role(name)
            if role in fractions:
                raise PlanError(f"{name!r} and {role!r} are the same role", where="remove")
            fractions[role] = fraction
            continue
        (chosen,) = bind_all([name], scope.program, "remove")
        if chosen.selector.role is None and chosen.selector.dim is None:
            raise PlanError(
                f"{name!r} means structures of many kinds",
                where="remove",
                hint=f"say which: {name}/ffn, or a dimension, {name}:0",
            )
        candidates = scope.meant(chosen)
        for c in candidates:
            other = claimed.setdefault(c.structure.name, name)
            if other != name:
                raise PlanError(
                    f"{other!r} and {name!r} both mean {c.structure.name}", where="remove"
                )
        pulled = _levers(ranking, counted_once(scope.program, candidates), uniform)
        _check_pull(pulled, fraction, f"that {name!r} means")
        pulls += [(name, lever, fraction) for lever in pulled]
    everything = fractions.pop(ALL, None)
    for role, fraction in fractions.items():
        candidates = [c for c in scope.candidates(role) if c.structure.name not in claimed]
        if candidates:
            pulled = _levers(ranking, counted_once(scope.program, candidates), uniform)
            _check_pull(pulled, fraction, f"with role {role!r}")
            pulls += [(role, lever, fraction) for lever in pulled]
    if everything is not None:
        for role in scope.prunable_roles():
            if role not in fractions:
                found = [c for c in scope.candidates(role) if c.structure.name not in claimed]
                found = counted_once(scope.program, found)
                for lever in _levers(ranking, found, uniform) if found else []:
                    _check_enough(lever, everything, f"with role {role!r}")
                    pulls.append((role, lever, everything))
    return pulls


def _check_pull(pulled: Sequence[Lever], fraction: float, what: str) -> None:
    """See that some of the structures can be smaller, and that as many units may go as are to."""
    if fraction and not any(lever.steps for lever in pulled):
        raise PlanError(
            f"nothing {what} can be smaller",
            why="align and minimum leave no size below the whole",
            hint="lower them, or leave it out",
        )
    for lever in pulled:
        _check_enough(lever, fraction, what)


def _check_enough(lever: Lever, fraction: float, what: str) -> None:
    """See that exclusions leave as many units as are to go."""
    wanted, units = lever.wanted(fraction), lever.wanted(1)
    if wanted > lever.removable:
        raise PlanError(
            f"{wanted} of the {units} units {what} are to go, and only {lever.removable} may",
            why=f"a fraction is of all of them, and exclude and include keep "
            f"{units - lever.removable}",
            hint=f"remove at most {lever.removable}/{units}, or keep fewer",
        )


def _budgeted(
    scope: Scope,
    ranking: _Ranking,
    target: Mapping[str, int | float],
    roles: Sequence[str] | None,
    uniform: bool,
) -> Counts:
    """Kept counts for a budget."""
    resource, budget = parse_target(target, scope.program.costs.total())
    measure = _cost(scope, ranking, resource)
    names: Sequence[str] = budget_roles(scope, roles)
    if roles is None:
        names = without_coarse(scope, names, measure, budget)
    pulled = [x for n in names for x in _levers(ranking, scope.candidates(n), uniform)]
    return fit(pulled, measure, budget, resource)


def _cost(scope: Scope, ranking: _Ranking, resource: str) -> Measure:
    """What kept counts cost of a resource."""
    program = scope.program

    def measure(counts: Counts) -> int:
        kept = {program.by_name[n]: count for n, count in counts.items()}
        stacks = [scope.candidate(s) for s in kept if s.blocks]
        ranked = ranking.choices(stacks)
        gone = [b for s, count in kept.items() for b in _cut(s, count, ranked)]
        atoms = {s.atom: count for s, count in kept.items() if s.atom is not None}
        return RESOURCES[resource](program.costs.total(atoms, gone))

    return measure


def _cut(structure: Structure, count: int, ranked: Mapping[str, Choice]) -> list[Block]:
    """The blocks that go when a stack keeps `count` layers; none of another structure."""
    if not structure.blocks:
        return []
    kept = ranked[structure.name].kept(count)
    return [b for b in structure.blocks if b.index not in kept]


def _levers(ranking: _Ranking, candidates: Sequence[Candidate], uniform: bool) -> list[Lever]:
    """The levers of some structures of one kind."""
    ranked = {} if uniform else ranking.of(candidates)
    return levers(candidates, uniform=uniform, ranked=ranked)
