"""What a compilation decides where a recipe leaves it open, and what it says of its proof."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.tokens import tokenizer_for
from graphprune.errors import CalibrationError, GraphPruneError
from graphprune.ir.torch.program import Program
from graphprune.oracle.verification import Certificate
from graphprune.passes.scores import get_score
from graphprune.passes.selection.scope import Scope
from graphprune.passes.selection.select import check_goal
from graphprune.passes.shared.judging import unjudged
from graphprune.plan.plan import Plan
from graphprune.preflight.data import without_tokenizer
from graphprune.recipe.recipe import Recipe


def changes_weights(recipe: Recipe) -> bool:
    """Whether a run looks at data group by group, so that it can be gone on with."""
    masks = recipe.sparsify is not None and recipe.sparsify.needs_data
    return recipe.operates or recipe.repairs or masks


def check_structures(program: BaseProgram, recipe: Recipe) -> None:
    """See that a recipe's structures can go, before weights are checked and data is read.

    Args:
        program: the dense program, with the recipe's names.
        recipe: the recipe.

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
        recipe: the recipe.
        program: the dense program.
        surgery: whether weights may be changed.

    Raises:
        LoadError: a language model has no tokenizer, and no data that needs none is given.
    """
    if recipe.score.name != "auto" or recipe.plan is not None:
        return recipe, ()
    notes: tuple[str, ...] = ()
    causal = program.is_causal
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
            usual = {"repair": "none" if causal else "reconstruct"}
            chosen = {"score": "obs", **(usual if recipe.repair.name == "auto" else {})}
    return Recipe.parse({**recipe.model_dump(exclude_unset=True), **chosen}), notes


def gives_data(recipe: Recipe) -> bool:
    """Whether a recipe says what to calibrate on."""
    return recipe.calibration.data is not None


def _without_values(program: Program) -> bool:
    return any(program.weights[name].is_meta for name in sorted(program.trainable)[:1])


def _without_data(program: BaseProgram) -> str:
    names = ", ".join(i.name for i in program.signature())
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
