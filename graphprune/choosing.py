"""What a compilation decides where a recipe leaves it open, and what it says of its proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from graphprune.early_data import without_tokenizer
from graphprune.errors import CalibrationError, GraphPruneError
from graphprune.inputs import inputs_of, is_causal
from graphprune.onnx_program import SlimOnnx
from graphprune.passes import get_score
from graphprune.passes.coupled import units_of
from graphprune.passes.judging import unjudged
from graphprune.passes.scope import Scope
from graphprune.passes.select import check_goal
from graphprune.plan import Plan
from graphprune.program import BaseProgram, Program
from graphprune.recipe import Recipe
from graphprune.rewrite.slim import Slim
from graphprune.samples.tokens import tokenizer_for
from graphprune.verification import Certificate


def changes_weights(recipe: Recipe) -> bool:
    """Whether a run looks at data group by group, so that it can be gone on with."""
    masks = recipe.sparsify is not None and recipe.sparsify.needs_data
    return recipe.operates or recipe.repairs or masks


def check_structures(program: BaseProgram, recipe: Recipe) -> None:
    """See that a recipe's structures can go, before weights are checked and data is read.

    Args:
        program: the dense program, with the recipe's names.
        recipe: it.

    Raises:
        PlanError: a selector means nothing, the model has no such role, a goal is out of reach, a
            saved plan is for another model, or the score doesn't take its options.
    """
    if recipe.plan is not None:
        Plan.load(recipe.plan).bind(program)
    elif recipe.removes:
        goals = {name: getattr(recipe, name) for name in ("remove", "target", "shape")}
        align: Mapping[str, int] | int = 1 if recipe.shape is not None else recipe.align
        whole: Mapping[str, str] = {}
        if recipe.score.name != "auto":
            whole = unjudged(get_score(recipe.score.model_dump()), program)
        scope = Scope(program, recipe.exclude, recipe.include, recipe.minimum, align, whole)
        check_goal(scope, goals, uniform=recipe.uniform)


def with_score(
    recipe: Recipe, program: BaseProgram, *, surgery: bool
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a score, and a repair, in place of ``auto``, and what to say of them.

    Wherever there is data, units are chosen by what they do to it. A language model has text; its
    largest activations pass through channels whose weights are small, so that magnitude alone
    would leave a model that guesses. Other models have what the recipe gives.

    Args:
        recipe: it.
        program: the dense program.
        surgery: whether weights may be changed.

    Raises:
        LoadError: a language model has no tokenizer, and no data that needs none is given.
    """
    if recipe.score.name != "auto" or recipe.plan is not None:
        return recipe, ()
    notes: tuple[str, ...] = ()
    causal = is_causal(program)
    wanted = recipe.calibration
    if isinstance(program, Program) and _without_values(program):
        chosen: dict[str, object] = {"score": "magnitude"}
    elif not causal and not gives_data(recipe):
        chosen, notes = {"score": "magnitude"}, (_without_data(program),)
    else:
        if causal and wanted.data is None and tokenizer_for(program, wanted) is None:
            source = program.source if isinstance(program, Program) else None
            raise without_tokenizer(recipe, str(source.path) if source and source.path else None)
        chosen = {"score": "taylor" if causal else "flap"}
        if surgery and recipe.rounds == 1:
            # A fit to the dense model is one to the calibration data: other texts lose by it.
            usual = "none" if causal else "reconstruct"
            repair = usual if recipe.repair == "auto" else recipe.repair
            chosen = {"score": "obs", "repair": repair}
    return Recipe.parse({**recipe.model_dump(exclude_unset=True), **chosen}), notes


def gives_data(recipe: Recipe) -> bool:
    """Whether a recipe says what to calibrate on."""
    return recipe.calibration.data is not None


def _without_values(program: Program) -> bool:
    return any(program.weights[name].is_meta for name in sorted(program.trainable)[:1])


def _without_data(program: BaseProgram) -> str:
    names = ", ".join(i.name for i in inputs_of(program))
    return (
        "no data: units are ranked by the size of their weights. With some samples of what the "
        f"model reads ({names}) they are chosen by what they do, and the layers that read them are "
        "refitted, which keeps far more: --data FILE, see docs/calibration-data.md"
    )


def without_surgery(recipe: Recipe, error: GraphPruneError) -> tuple[Recipe, str]:
    """The recipe for a model that can't be calibrated, where the score was left to us, and why."""
    changes = {"score": "taylor", "repair": "none"}
    changed = Recipe.parse({**recipe.model_dump(exclude_unset=True), **changes})
    return changed, f"{error.what} ({error.why}): units are ranked by taylor, and no layer refitted"


def without_fallback(error: GraphPruneError) -> CalibrationError:
    """The error of a model that makes no sense of data that somebody has given."""
    hint = f"{error.hint}; --score taylor ranks its units all the same, and refits nothing"
    return CalibrationError(error.what, where=error.where, why=error.why, hint=hint)


def in_pieces(certificate: Certificate) -> tuple[str, ...]:
    """What to say of a quantised model, whose rounding makes steps of the smallest differences."""
    if not certificate.steps:
        return ()
    return (
        f"compared at {certificate.steps} quantisation steps, from one to the next; "
        f"all in one, outputs differ by {certificate.drift:.1e}",
    )


def little_proof(certificate: Certificate) -> tuple[str, ...]:
    """What to say where the inputs would have hidden a wrong cut."""
    if certificate.dense_difference > certificate.tolerance:
        return ()
    return (
        "random inputs show no effect of pruning, so that the comparison with the masked model "
        "says little: verify with inputs of your own",
    )


def kept_units(slim: Slim | SlimOnnx) -> dict[str, tuple[int, int]]:
    """Units kept and units there were, of every role that loses some."""
    program, units = slim.program, slim.plan.kept_units
    gone = slim.selection.removed_parameters
    structures = [s for s in program.by_name.values() if s.prunable]
    sizes, left = {s.name: s.size for s in structures}, {}
    for s in structures:
        stays = s.blocks or not gone.issuperset(name for name, _ in s.members)
        rows = units.get(s.name, range(s.size))
        left[s.name] = (len(rows[0]) if isinstance(rows[0], tuple) else len(rows)) if stays else 0
    total: dict[str, int] = defaultdict(int)
    kept: dict[str, int] = defaultdict(int)
    for name, (before, after) in units_of(program, structures, sizes, left).items():
        role = program.by_name[name].role or "other"
        total[role] += before
        kept[role] += after
    named = {program.by_name[name].role or "other" for name in units}
    return {role: (kept[role], total[role]) for role in total if role in named}
