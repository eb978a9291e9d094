"""``graphprune recipes`` and ``graphprune explain``: what is shipped, and what a recipe does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.options import Json
from graphprune.cli.shown import show


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this one; with or without .yaml.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that come with the package, or print one.

    `graphprune compile MODEL NAME` takes them by name.
    """
    from graphprune.recipe.shipped import shipped, shipped_text, summary

    if name is not None:
        text = shipped_text(name)
        show(json.dumps({"name": name, "text": text}, indent=2) + "\n" if as_json else text)
        return
    found = {one: summary(one) for one in shipped()}
    if as_json:
        show(json.dumps(found, indent=2) + "\n")
        return
    width = max(map(len, found))
    show("".join(f"{one:{width}}  {told}\n" for one, told in found.items()))


def explain(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of a shipped one.")],
    as_json: Json = False,
) -> None:
    """Say in plain sentences what a recipe will do; no model is loaded."""
    from graphprune.recipe.explaining import explain as explained
    from graphprune.recipe.recipe import Recipe

    found = explained(Recipe.load(recipe))
    show(json.dumps(found, indent=2) + "\n" if as_json else "\n".join(found) + "\n")
