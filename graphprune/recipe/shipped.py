"""Recipes that come with the package, by the names of their files."""

from __future__ import annotations

from pathlib import Path

_PLACE = Path(__file__).parent / "presets"


def shipped() -> tuple[str, ...]:
    """The names of the recipes that come with the package, in order."""
    return tuple(sorted(file.name for file in _PLACE.glob("*.yaml")))


def recipe_file(path: str | Path) -> Path:
    """The file that a path means: a bare name that isn't there may be that of one of ours."""
    path = Path(path)
    own = path.name == str(path) and path.name in shipped() and not path.exists()
    return _PLACE / path.name if own else path
