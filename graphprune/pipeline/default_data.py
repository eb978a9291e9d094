"""The calibration data of a recipe that leaves it open."""

from __future__ import annotations

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.general import general_parts
from graphprune.calibration.sources.amounts import GENERAL
from graphprune.calibration.sources.section import Part
from graphprune.calibration.text.read import OWN_TEXTS, SELF
from graphprune.calibration.tokens import tokenizer_for
from graphprune.recipe.recipe import Recipe


def with_data(recipe: Recipe, program: BaseProgram) -> Recipe:
    """The recipe with data for choosing units and refitting weights of a language model.

    Without any it is general text; of a text of the user's 45 % of the windows are taken, and the
    others are general text, unless the recipe says otherwise. Other sources and mixtures are taken
    as they are. Masks have windows so long that a model would write its own for hours: with them
    the data is the built-in text or the user's.

    Args:
        recipe: with a score and a repair in place of ``auto``.
        program: the dense program.
    """
    wanted = recipe.calibration
    if (
        recipe.masks_on_data
        or not any(one.fits_weights and one.needs_data for one in recipe.passes)
        or not _reads_text(recipe, program)
    ):
        return recipe
    if wanted.data is None:
        parts = general_parts(program)
        if wanted.windows is not None and wanted.windows < len(parts):
            parts = dict(list(parts.items())[: wanted.windows])
        data = {name: Part(source=part.source) for name, part in parts.items()}
        changes: dict[str, object] = {"data": data}
    elif wanted.general is None and wanted.source not in (None, SELF, *OWN_TEXTS):
        changes = {"general": GENERAL}
    else:
        return recipe
    return recipe.replaced(calibration=wanted.model_copy(update=changes))


def _reads_text(recipe: Recipe, program: BaseProgram) -> bool:
    return program.is_causal and tokenizer_for(program, recipe.calibration) is not None
