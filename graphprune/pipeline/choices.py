"""What a compilation chooses where its recipe leaves it open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.sources.amounts import REPAIRS
from graphprune.calibration.tokens import tokenizer_for
from graphprune.errors import CalibrationError, GraphPruneError
from graphprune.ir.torch.program import is_traced
from graphprune.preflight.data import without_tokenizer
from graphprune.recipe.named import AUTO, Repairing, Score
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.selection import Selection
from graphprune.recipe.steps import Planned

AFTER_DEEP_CUTS = {"train": "full", "loss": "kd", "epochs": 2, "batch": 4, "lr": 3e-4}
"""How a language model is trained that has lost more than half of some role."""


@dataclass(frozen=True)
class Choices:
    """A recipe with nothing left open.

    Attributes:
        recipe: with a score and a repair in place of ``auto``.
        open: what was left to us: "score", "repair", "training".
        notes: what to say of it.
    """

    recipe: Recipe
    open: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def choose_methods(
    recipe: Recipe, program: BaseProgram, *, surgery: bool, deep: bool = False
) -> Choices:
    """Put a score, and a repair, in place of ``auto``, and training where it is left to us.

    Wherever there is data, units are chosen by what they do to it. A language model has text; its
    largest activations pass through channels whose weights are small, so that magnitude alone
    would leave a model that guesses. Other models have what the recipe gives.

    Args:
        recipe: the recipe.
        program: the dense program.
        surgery: whether weights may be changed.
        deep: whether units of some role go of which few models recover without training.

    Raises:
        LoadError: a language model has no tokenizer, and no data that needs none is given.
    """
    recipe, told = _with_effort(recipe, program, surgery)
    if not any(_is_open(one) for one in recipe.passes):
        return Choices(recipe, frozenset(), told)
    open_ = {"score"}
    if deep and surgery and _leaves_training(recipe, program):
        recipe, more = _with_training(recipe)
        told = (*told, more)
        open_.add("training")
    surgery = surgery and recipe.effort != "fast"
    causal = program.is_causal
    wanted = recipe.calibration
    notes: tuple[str, ...] = ()
    ranked = "taylor" if causal else "flap"
    if _without_values(program):
        ranked, surgery = "magnitude", False
    elif not causal and not gives_data(recipe):
        ranked, surgery, notes = "magnitude", False, (_without_data(program),)
    elif causal and wanted.data is None and tokenizer_for(program, wanted) is None:
        source = program.source
        raise without_tokenizer(recipe, str(source.path) if source and source.path else None)

    def chosen(place: int) -> str:
        alone = recipe.passes[place].round.of == 1
        first = not any(one.name in ("select", "replay") for one in recipe.passes[:place])
        return "obs" if surgery and alone and first else ranked

    found = _with_score(recipe, chosen)
    if recipe.steps is None and recipe.repair.name == AUTO:
        open_.add("repair")
        if found.operates:
            # A fit to the dense model is one to the calibration data: other texts lose by it.
            found = found.replaced(repair=Repairing(name="none" if causal else "reconstruct"))
    return Choices(found.replaced(effort=None), frozenset(open_), (*told, *notes))


def _with_effort(
    recipe: Recipe, program: BaseProgram, surgery: bool
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the training that its effort stands for, where the model can be trained."""
    wanted = {"balanced": ("match",), "best": ("match", "recover")}.get(recipe.effort or "", ())
    missing = [name for name in wanted if getattr(recipe, name) is None]
    if not missing or not surgery:
        return recipe, ()
    if not is_traced(program) or _without_values(program):
        kind = "has no weights" if is_traced(program) else "is an ONNX graph"
        return recipe, (f"effort {recipe.effort}: nothing is trained, since the model {kind}",)
    notes: tuple[str, ...] = ()
    if "match" in missing and not program.stacks():
        missing.remove("match")
        notes = (f"effort {recipe.effort}: nothing is matched, since the model has no stack of "
                 "residual blocks",)  # fmt: skip
    return recipe.replaced(**{name: {} for name in missing}), notes


def _leaves_training(recipe: Recipe, program: BaseProgram) -> bool:
    """Whether a language model may be trained that nobody has said anything about training of."""
    return (
        recipe.leaves_training
        and program.is_causal
        and is_traced(program)
        and not _without_values(program)
    )


def _with_training(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with a short training on what is calibrated on anyway, and what to say of it."""
    if find_spec("accelerate") is None:
        return recipe, (
            "training would make up for much of that, and needs accelerate: "
            "pip install 'graphprune[train]'"
        )
    wanted = recipe.calibration
    if wanted.windows is None:
        wanted = wanted.model_copy(update={"windows": REPAIRS.count})
    note = (
        f"after a cut so deep, what is left is to be trained on the {wanted.windows} calibration "
        "windows (effort: usual leaves that out, effort: best trains longer)"
    )
    return recipe.replaced(recover=dict(AFTER_DEEP_CUTS), calibration=wanted), note


def _is_open(one: Planned) -> bool:
    return isinstance(one.options, Selection) and one.options.score.name == AUTO


def _with_score(recipe: Recipe, chosen: Callable[[int], str]) -> Recipe:
    """The recipe with a score for each selection of its passes that has none, by its place."""
    names = {n: chosen(n) for n, one in enumerate(recipe.passes) if _is_open(one)}
    if recipe.steps is None:
        return recipe.replaced(score=Score(name=next(iter(names.values()), recipe.score.name)))
    places = iter(range(len(recipe.passes)))

    def settled(one: Planned) -> Planned:
        place = next(places)
        if place not in names:
            return one
        options = one.options.model_copy(update={"score": Score(name=names[place])})
        return Planned(one.name, options, one.round)

    return recipe.replaced(steps=tuple(step.settled(settled) for step in recipe.steps))


def gives_data(recipe: Recipe) -> bool:
    """Whether a recipe says what to calibrate on."""
    return recipe.calibration.data is not None


def _without_values(program: BaseProgram) -> bool:
    return any(program.weights[name].is_meta for name in sorted(program.trainable)[:1])


def _without_data(program: BaseProgram) -> str:
    names = ", ".join(i.name for i in program.signature())
    return (
        "no data: units are ranked by the size of their weights. With some samples of what the "
        f"model reads ({names}) they are chosen by what they do, and the layers that read them are "
        "refitted, which keeps far more: --data FILE, see docs/calibration-data.md"
    )


def without_surgery(
    recipe: Recipe, open_: frozenset[str], error: GraphPruneError
) -> tuple[Recipe, str]:
    """The recipe for a model that can't be calibrated, where the score was left to us, and why."""
    changed = recipe.replaced(score=Score(name="taylor"), repair=Repairing(name="none"))
    left = "no layer refitted"
    if "training" in open_:
        changed, left = changed.replaced(recover=None), "nothing refitted or trained"
    return changed, f"{error.what} ({error.why}): units are ranked by taylor, and {left}"


def without_fallback(error: GraphPruneError) -> CalibrationError:
    """The error of a model that makes no sense of data that somebody has given."""
    hint = f"{error.hint}; --score taylor ranks its units all the same, and refits nothing"
    return CalibrationError(error.what, where=error.where, why=error.why, hint=hint)
