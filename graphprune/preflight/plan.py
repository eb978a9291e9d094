"""Plans and shapes beside the tensors that a checkpoint's files hold, before anything is traced."""

from __future__ import annotations

import re
from itertools import chain

from graphprune.errors import PlanError
from graphprune.plan.plan import Plan
from graphprune.preflight.known import Known
from graphprune.recipe.recipe import Recipe

_WHOLE = re.compile(r"(?P<parameter>.+):(?P<dim>\d+)")
"""The name of a structure that is all of a dimension; of a part of it more follows."""


def check_plan(recipe: Recipe, known: Known) -> None:
    """See that a saved plan is one, and of this model as far as its tensors' shapes tell.

    Raises:
        PlanError: it isn't.
    """
    for path in recipe.plans:
        _check_saved(path, known)


def _check_saved(path: str, known: Known) -> None:
    plan = Plan.load(path)
    for name, size in plan.sizes.items():
        found = _WHOLE.fullmatch(name)
        shape = known.shapes.get(found["parameter"]) if found else None
        if found is None or shape is None:
            continue
        own = shape[int(found["dim"])] if int(found["dim"]) < len(shape) else None
        if own != size:
            has = "no such dimension" if own is None else f"{own:,} indices"
            raise PlanError(
                "the plan doesn't belong to this model",
                where=path,
                why=f"it was made for a model whose {name} has {size:,} units, and here it has "
                f"{has}",
                hint="make a new plan for this model with `graphprune compile --dry-run`",
            )


def check_sizes(recipe: Recipe, known: Known) -> None:
    """See that no size of a shape is above all that the checkpoint has.

    Raises:
        PlanError: one is.
    """
    if not known.shapes:
        return
    widest = max(max(shape, default=0) for shape in known.shapes.values())
    most = max(widest, len(known.shapes))
    shapes = ((s.shape or {}).items() for s in recipe.selections)
    for role, size in chain.from_iterable(shapes):
        if size > most:
            raise PlanError(
                f"the shape {role} {size} is not reachable",
                where=f"shape {role}",
                why=f"no dimension of the model has more than {widest:,} indices",
                hint="ask for less than the model has: graphprune inspect shows its sizes",
            )
