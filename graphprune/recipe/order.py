"""The order of passes that means something."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.recipe.selection import Selection
from graphprune.recipe.steps import LEARNING, REMOVING, Planned


def check_order(passes: Sequence[Planned]) -> None:
    """See that each pass has what it works on.

    Raises:
        ValueError: one hasn't.
    """
    chosen = False
    for one in passes:
        if one.name == "repair" and not chosen:
            raise ValueError("a repair makes up for what goes: put it behind select or replay")
        surgery = isinstance(one.options, Selection) and one.options.operates
        if surgery and (chosen or one.round.of > 1):
            raise ValueError(
                "score obs chooses in one round: it weighs every unit in the model as pruned so "
                "far; put it first, and don't repeat it"
            )
        if one.name == "replay" and chosen:
            raise ValueError("a saved plan is for the dense model: put replay first")
        if one.name in LEARNING and (chosen or one.round.of > 1):
            raise ValueError(
                f"{one.name} chooses all units that go of the whole model: put it first, and don't "
                "repeat it"
            )
        chosen = chosen or one.name in REMOVING
