"""What is said of a recipe that isn't valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from graphprune.calibration.sources.section import FORMS
from graphprune.options import nearest


def explain(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Turns one pydantic error into a sentence that names the key and the nearest valid word.

    Args:
        error: As pydantic lists it.
        root: The model that was validated.
    """
    # A bad key of a mapping is located at ('remove', 'fnn', '[key]'), and a value of several forms
    # at that which it was taken for.
    place = [str(part)[:80] for part in error["loc"] if part not in ("[key]", *FORMS)]
    path = ".".join(place)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _section(root, place[:-1]).model_fields
        return f"unknown key '{path}'; {nearest(place[-1], fields)}"
    if error["type"] == "literal_error":
        message = f"'{error['input']}' is not {error['ctx']['expected']}"
    message = message if len(message) <= 400 else f"{message[:400]}..."
    return f"in '{path}': {message}" if place else message


def _section(root: type[BaseModel], place: Sequence[str]) -> type[BaseModel]:
    """The model of the section at a place; keys and numbers of entries are passed over."""
    for part in place:
        if part in root.model_fields:
            root = next(_models(root.model_fields[part].annotation), root)
    return root


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
