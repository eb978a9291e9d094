"""The stages of a compilation that choose units with the data and repair weights for a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.structure import Structure
from graphprune.emit.written import check_written
from graphprune.errors import RecipeError
from graphprune.ir.torch.program import Program
from graphprune.passes.repair.structured import Repaired, obs, read_by
from graphprune.passes.scores import get_score
from graphprune.passes.scores.random_score import Random
from graphprune.passes.shared.judging import unjudged
from graphprune.passes.shared.score import Inputs, Score
from graphprune.pipeline.masking import slim_names
from graphprune.plan.kept import is_ragged
from graphprune.plan.plan import Plan
from graphprune.plan.units import FloatArray
from graphprune.recipe.recipe import Recipe
from graphprune.report.report import Report
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.solvers import Reconstruct
from graphprune.solvers.obs import Surgeon
from graphprune.streaming import State, Step

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
    recipe: Recipe,
    samples: Any,
    choose: Choose,
    *,
    auto: bool,
    progress: Callable[[str], None],
    state: State | None,
) -> Repaired:
    """Units of a recipe's goal by structured optimal brain surgery, with refitted weights.

    Args:
        program: the dense program.
        recipe: with score obs.
        samples: see `graphprune.streaming.batches`.
        choose: makes the recipe's plan with a score.
        auto: whether roles that surgery can't weigh are left to other scores; otherwise they are
            an error.
        progress: told of each group of weights.
        state: where progress is saved.

    Raises:
        GraphPruneError: see `graphprune.passes.repair.structured.obs`.
    """
    if recipe.rounds > 1:
        raise RecipeError(
            "score obs chooses in one round",
            where="rounds",
            hint="leave rounds out: every unit is weighed in the model as pruned so far",
        )
    # Where every structure of a role keeps as many units, counts don't depend on what they are.
    ranked: Score = Random() if recipe.uniform else get_score("obs")
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
    if not keep:
        return Repaired(program, given, (), {})
    options = recipe.score.model_extra or {}
    surgeon = Surgeon(steps=int(options.get("steps", Surgeon.steps)))
    found = obs(
        program,
        samples,
        keep,
        given=given if rest else None,
        surgeon=surgeon,
        damping=float(options.get("damping", Reconstruct.damping)),
        progress=_told(progress, "choosing units"),
        state=state,
    )
    scores = {n: notes.scores for n, notes in plan.notes.items() if n in rest and notes.scores}
    return replace(found, plan=found.plan.noted(program, scores))


def otherwise(program: BaseProgram, role: str) -> str:
    """The score that stands in for surgery where no weight multiplies by the units of a role.

    Gradients need a loss, which language models alone have, and what is none of the others' is left
    to the size of weights.
    """
    if not isinstance(program, Program):
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


def may_be_refitted(program: BaseProgram, plan: Plan) -> bool:
    """Whether anything can make up for what a plan removes: what reads it, or what stays of layers.

    Whole layers are made up for by the others of their residual stream.
    """
    layers = any(program.by_name[name].blocks for name in plan.kept_units)
    return layers or bool(read_by(program, plan))


def repaired(
    program: BaseProgram,
    plan: Plan,
    recipe: Recipe,
    samples: Any,
    *,
    progress: Callable[[str], None],
    state: State | None,
) -> Repaired:
    """The dense program with weights that make up for what a plan removes.

    Args:
        program: the dense program, with its own weights.
        plan: what stays.
        recipe: with a repair.
        samples: see `graphprune.streaming.batches`.
        progress: told of each group of weights.
        state: where progress is saved.

    Raises:
        GraphPruneError: see `graphprune.passes.repair.structured`.
    """
    told = _told(progress, "repairing weights")
    return recipe.repair.built().repair(program, samples, plan, progress=told, state=state)


def with_places(report: Report, path: Path, form: str, slim: Slim | SlimOnnx) -> Report:
    """The report with the places that refitted weights have in a written file.

    Raises:
        VerifyError: the file doesn't hold them as they are.
    """
    if report.refits is None:
        return report
    weights: dict[str, Tensor] = {}
    names, kept = slim_names(slim), slim.plan.kept(slim.program)
    for parameter in report.refits.parameters:
        places = [torch.from_numpy(indices) for indices in kept[parameter]]
        if parameter in names and all(map(len, places)):
            weight = slim.program.weights[parameter].detach()
            weights[names[parameter]] = weight[torch.meshgrid(*places, indexing="ij")]
    tied: dict[str, list[str]] = defaultdict(list)
    for alias, name in (slim.aliases if isinstance(slim, Slim) else {}).items():
        tied[name].append(alias)
    found = check_written(path, form, weights, tied)
    found_at = {**report.refits.places, **({form: found.places} if found.places else {})}
    return replace(report, refits=replace(report.refits, places=found_at))


def _told(progress: Callable[[str], None], what: str) -> Callable[[Step], None]:
    def tell(step: Step) -> None:
        progress(f"{what}: {step.group.index + 1} of {step.total}")

    return tell
