"""Recipes that come with the package, by the names of their files."""

from __future__ import annotations

import re
from pathlib import Path

from graphprune.errors import RecipeError
from graphprune.options import nearest

_PLACE = Path(__file__).parent / "presets"


def shipped() -> tuple[str, ...]:
    """The names of the recipes that come with the package, in order."""
    return tuple(sorted(file.name for file in _PLACE.glob("*.yaml")))


def recipe_file(path: str | Path) -> Path:
    """The file that a path means: a bare name that isn't there may be that of one of ours.

    Args:
        path: of a file; or a name, with or without ``.yaml``.
    """
    path = Path(path)
    name = f"{path.name.removesuffix('.yaml')}.yaml"
    ours = path.name == str(path) and name in shipped()
    return _PLACE / name if ours and not path.exists() else path


def shipped_text(name: str) -> str:
    """The text of one of ours.

    Args:
        name: with or without ``.yaml``.

    Raises:
        RecipeError: there is none of that name.
    """
    known = {one.removesuffix(".yaml"): one for one in shipped()}
    file = known.get(name.removesuffix(".yaml"))
    if file is None:
        raise RecipeError(f"no recipe '{name}' is shipped", hint=nearest(name, known))
    return (_PLACE / file).read_text(encoding="utf-8")


def summary(name: str) -> str:
    """What one of ours says of itself: the first sentence of its head."""
    lines = [line[1:].strip() for line in shipped_text(name).splitlines() if line.startswith("#")]
    head = " ".join(lines)
    found = re.match(r"(.+?)(?:[.:] |$)", head)
    return found[1] if found else ""
