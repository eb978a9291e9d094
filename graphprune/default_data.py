"""The calibration data of a recipe that leaves it open."""

from __future__ import annotations

from graphprune.calibration import OWN_TEXTS
from graphprune.choosing import changes_weights
from graphprune.inputs import is_causal
from graphprune.program import BaseProgram, Program
from graphprune.recipe import Recipe
from graphprune.samples.general import general_parts
from graphprune.samples.generated import SELF
from graphprune.samples.tokens import tokenizer_for

GENERAL = 0.5
"""Share of the windows that are general text where the data is a text of the user's."""


def with_data(recipe: Recipe, program: BaseProgram) -> Recipe:
    """The recipe with data for what changes the weights of a language model.

    Without any it is general text; a text of the user's is joined by as much of it, unless the
    recipe says otherwise. Other sources and mixtures are taken as they are.

    Args:
        recipe: with a score and a repair in place of ``auto``.
        program: the dense program.
    """
    wanted = recipe.calibration
    if not changes_weights(recipe) or not _reads_text(recipe, program):
        return recipe
    if wanted.data is None:
        parts = general_parts(program)
        if wanted.windows is not None and wanted.windows < len(parts):
            parts = dict(list(parts.items())[: wanted.windows])
        data = {name: {"source": part.source} for name, part in parts.items()}
        changes: dict[str, object] = {"data": data}
    elif wanted.general is None and wanted.source not in (None, SELF, *OWN_TEXTS):
        changes = {"general": GENERAL}
    else:
        return recipe
    section = wanted.model_dump(exclude_unset=True) | changes
    return Recipe.parse({**recipe.model_dump(exclude_unset=True), "calibration": section})


def _reads_text(recipe: Recipe, program: BaseProgram) -> bool:
    return (
        isinstance(program, Program)
        and is_causal(program)
        and tokenizer_for(program, recipe.calibration) is not None
    )
