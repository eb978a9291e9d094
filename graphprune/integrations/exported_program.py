"""From a ``torch.export`` program to a smaller one, for pipelines that begin with an export."""

from __future__ import annotations

from torch.export import ExportedProgram

from graphprune.frontends.pt2.read import from_exported
from graphprune.integrations.goal import Choice, carry_out, settle


def prune(
    exported: ExportedProgram,
    recipe: Choice | None = None,
    *,
    check: bool = True,
    **settings: object,
) -> ExportedProgram:
    """Prune an exported program.

    Args:
        exported: of a module in evaluation mode; it stays as it is.
        recipe: a plan, a recipe, its plain data, or the path of a recipe in YAML.
        check: compare the result with the masked model on random inputs.
        **settings: keys of a recipe, such as ``remove={"ffn": 0.25}``; they win over `recipe`'s.

    Returns:
        A valid program with the same inputs, outputs and dynamic dimensions. Tensors of which
        nothing is cut are shared with `exported`; no parameter requires a gradient.

    Raises:
        RecipeError: the recipe can't be understood.
        PlanError: it can't be carried out on this model.
        VerifyError: the result doesn't equal the masked model.
    """
    goal = settle(recipe, settings)
    return carry_out(from_exported(exported), goal, check=check).exported
