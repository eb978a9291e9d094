"""What a run reads of a recipe's section ``calibration``: what is given for nothing is an error.

A path that nobody opens may be misspelt without anybody knowing, and whoever gives data to a run
that looks at none takes its result for something else than it is.
"""

from __future__ import annotations

from graphprune.calibration.sources.kinds import OPTIONS
from graphprune.calibration.text.read import OWN_TEXTS
from graphprune.errors import RecipeError
from graphprune.recipe.named import AUTO
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.selection import Selection

_SIZES = ("windows", "length", "draw")
"""Options of calibration data and of the text that a perplexity is measured on."""


def scores_on_data(recipe: Recipe) -> bool:
    """Whether units are ranked on data: `auto` does so wherever some is given.

    Raises:
        PlanError: see `Recipe.score_needs_data`.
    """
    return recipe.score_needs_data or any(s.score.name == AUTO for s in recipe.selections)


def calibrates(recipe: Recipe) -> bool:
    """Whether anything of a run looks at calibration data.

    Raises:
        PlanError: see `scores_on_data`.
    """
    return scores_on_data(recipe) or any(
        one.needs_data for one in recipe.passes if not isinstance(one.options, Selection)
    )


def without_data(recipe: Recipe) -> Recipe:
    """A recipe without the calibration data that nothing of it reads, though others do."""
    fields = type(recipe.calibration).model_fields
    unread = ("data", "general", *OPTIONS)
    left = {name: fields[name].default for name in unread if name in fields}
    return recipe.replaced(calibration=recipe.calibration.model_copy(update=left))


def check_read(recipe: Recipe, causal: bool | None) -> None:
    """See that something reads whatever a recipe's section ``calibration`` gives.

    Args:
        recipe: the recipe.
        causal: whether the model is a causal language model, whose perplexity is measured; None
            where that isn't known yet, so that a text may be read.

    Raises:
        RecipeError: nothing reads an entry.
    """
    wanted = recipe.calibration
    measures, calibrated = causal is not False, calibrates(recipe)
    from_text = wanted.data is None and wanted.text is not None and measures
    read = {
        "data": calibrated,
        "general": calibrated,
        "text": measures,
        "tokenizer": measures or calibrated,
        **dict.fromkeys(_SIZES, measures or calibrated),
        **dict.fromkeys(OPTIONS, calibrated or from_text),
    }
    for name in type(wanted).model_fields:
        value = getattr(wanted, name)
        if read[name] or value == type(wanted).model_fields[name].default:
            continue
        raise RecipeError(
            f"nothing reads calibration.{name}",
            where=(", ".join(value) if name == "text" else str(value))[:200],
            why=_why(recipe, name, calibrated),
            hint=_hint(recipe, name, calibrated),
        )


def _why(recipe: Recipe, name: str, calibrated: bool) -> str:
    if calibrated:  # so that this is the text beside data, for a model without a perplexity
        return "a perplexity is measured of causal language models only, and this is none"
    parts = []
    if recipe.plans:
        parts.append("a saved plan needs no score")
    for score in dict.fromkeys(s.score.name for s in recipe.selections):
        parts.append(f"score {score} looks at no data")
    for method in dict.fromkeys(masks.method for masks in recipe.masks):
        parts.append(f"masks by {method} look at {'none' if parts else 'no data'}")
    if not recipe.masks:
        parts.append("there are no masks")
    if recipe.removes:
        parts.append("nothing is refitted")
    told = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    if name in ("data", *OPTIONS):
        return told
    return f"{told}, and no perplexity is measured but of causal language models"


def _hint(recipe: Recipe, name: str, calibrated: bool) -> str:
    if calibrated:
        return "leave it out"
    able = []
    if recipe.selections:
        able.append("choose a score that does, such as auto")
    if recipe.removes:
        able.append("add repair: reconstruct")
    able = able or ["take a method that does, such as sparsegpt"]
    own = isinstance(recipe.calibration.data, str) and recipe.calibration.data not in OWN_TEXTS
    if name == "data" and own:
        able.append("give it as text to measure the perplexity of a language model on")
    return f"leave it out, {', '.join(able[:-1])}{' or ' if len(able) > 1 else 'or '}{able[-1]}"
