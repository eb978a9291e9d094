"""Every option of the command line and every key of recipes, read off the code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from _tables import table

INNER = ("calibration", "sparsify", "verify")
"""Keys of a recipe that have keys of their own."""


def page() -> str:
    """Return both parts."""
    return f"## Commands\n\n{commands()}## Recipes\n\n{recipes()}"


def commands() -> str:
    """Return a section for each command: what it does, its arguments and its options."""
    import typer

    from graphprune.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        words = inspect.cleandoc(command.help or "")
        rows = [_parameter(one) for one in command.params if one.name != "help"]
        parts.append(f"### graphprune {name}\n\n{words}\n\n{table(('', ''), rows)}\n")
    return "".join(parts)


def _parameter(one: Any) -> tuple[str, str]:
    """How an argument or an option is written, and what its help says."""
    if one.param_type_name == "argument":
        written = f"`{one.name.upper()}`"
    else:
        written = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
    return written, _plain(one.help or "")


def recipes() -> str:
    """Return the keys of a recipe, of its sections, and of the passes that `steps` list."""
    from graphprune.recipe.recipe import Recipe
    from graphprune.recipe.steps import PASSES, Step

    parts = [_keys("Keys", Recipe, Recipe.model_fields)]
    for name in INNER:
        (model,) = models(Recipe.model_fields[name].annotation)
        parts.append(_keys(f"Keys of `{name}`", model, model.model_fields))
    for name in PASSES.own:
        made: Any = PASSES.find(name)
        if name not in Step.model_fields:
            names = [field.name for field in dataclasses.fields(made)]
            parts.append(_keys(f"Options of `{name}`", made, names))
    return "".join(parts)


def models(annotation: Any) -> list[Any]:
    """Return the sections that a key may hold."""
    if isinstance(annotation, type):
        return [annotation] if hasattr(annotation, "model_fields") else []
    return [one for part in getattr(annotation, "__args__", ()) for one in models(part)]


def _keys(title: str, kind: Any, names: Any) -> str:
    """A table of the fields of a class: name, default, and what its docstring says."""
    from graphprune.training import Training

    told = described(kind)
    shared = described(Training)
    for name in names:
        if told[name].lower().startswith("see "):  # that of all training
            told[name] = shared[name]
    rows = [(f"`{name}`", _default(kind, name), told[name]) for name in names]
    return f"### {title}\n\n{table(('key', 'default', ''), rows)}\n"


def described(kind: Any) -> dict[str, str]:
    """Return what docstrings say of the attributes of a class and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found.update(_attributes(inspect.getdoc(base) or "") if base.__doc__ else ())
    return found


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    """The entries under "Attributes:" of a docstring in Google's style."""
    _, _, listed = text.partition("\nAttributes:\n")
    block = re.split(r"\n(?=\S)", listed)[0]
    for entry in re.split(r"\n(?=    \S)", f"\n{block}"):
        name, colon, words = entry.strip().partition(":")
        if colon and name.isidentifier():
            words = _plain(words)
            yield name, words[:1].upper() + words[1:]


def _default(kind: Any, name: str) -> str:
    """A default as a recipe would say it."""
    if hasattr(kind, "model_fields"):
        field = kind.model_fields[name]
        value = None if field.is_required() else field.default
    else:
        value = next(one.default for one in dataclasses.fields(kind) if one.name == name)
    if hasattr(value, "name"):  # of an entry for which a bare name stands
        value = value.name
    if value is None or value is dataclasses.MISSING or hasattr(value, "model_fields"):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | dict) and not value:
        return ""
    if isinstance(value, tuple):
        value = f"[{', '.join(map(str, value))}]"
    return f"`{value}`"


def _plain(text: str) -> str:
    """A text in which single backticks are left for code, on one line."""
    return " ".join(text.replace("``", "`").split())
