"""A recipe of the command line: its flags, and the file that they go on top of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from graphprune.errors import RecipeError
from graphprune.passes.selection.alignment import alignment_words
from graphprune.recipe.selection import WHAT
from graphprune.recipe.sparsify import Sparsify


def with_flags(base: object, flags: Mapping[str, object]) -> object:
    """Put flags on top of a recipe's plain data.

    Args:
        base: what the file has; what is no mapping is given back as it is.
        flags: Recipe keys, ``text`` and ``data`` for those of the calibration, and ``sparsify``, a
            mapping of that section's keys; None and empty values count as not given. ``remove``,
            ``target`` and ``shape`` are lists of words such as ``ffn=0.25``, and a goal replaces
            the goal of the file. ``include`` and ``exclude`` belong to ``sparsify`` where no
            structures are removed.

    Raises:
        RecipeError: a word is not ``key=number``.
    """
    goals = (*WHAT, "plan")
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    if isinstance(given.get("align"), list | tuple):
        given["align"] = alignment_words(cast("Iterable[str]", given["align"]))
    for goal in WHAT:
        if goal in given:
            given[goal] = _pairs(goal, cast("Iterable[str]", given[goal]))
    if not isinstance(base, Mapping):
        return base
    if any(goal in given for goal in goals):
        base = {key: value for key, value in base.items() if key not in goals}
    masks = {k: v for k, v in cast("Mapping[str, object]", given.pop("sparsify", {})).items()
             if v is not None}  # fmt: skip
    if masks or "sparsify" in base:
        if not any(goal in given or goal in base for goal in goals):
            masks |= {k: given.pop(k) for k in ("include", "exclude") if k in given}
        given["sparsify"] = _joined(base.get("sparsify"), masks)
    sources = {key: given.pop(key) for key in ("text", "data") if key in given}
    if sources:
        section = base.get("calibration")
        own = section if isinstance(section, Mapping) else {}
        given["calibration"] = {**own, **sources}
    return {**base, **given}


def _joined(section: object, flags: Mapping[str, object]) -> object:
    """A section ``sparsify`` with flags in place of its entries.

    The options of one method mean nothing to another, and a pattern takes the place of a sparsity.
    """
    if not flags:
        return section
    own = dict(section) if isinstance(section, Mapping) else {}
    if isinstance(section, str):
        own = {"method": section}
    if flags.get("method", own.get("method")) != own.get("method"):
        own = {key: value for key, value in own.items() if key in Sparsify.model_fields}
    if "sparsity" in flags or "pattern" in flags:
        own = {key: value for key, value in own.items() if key not in ("sparsity", "pattern")}
    joined = {**own, **flags}
    if "method" not in joined:
        raise RecipeError(
            "no method is given for the weights that are to become zero",
            where=f"--{next(iter(flags))}",
            hint="add --sparsify sparsegpt, or another method",
        )
    return joined


def _pairs(goal: str, words: Iterable[str]) -> dict[str, str]:
    """Reads ``ffn=0.25 heads=1/3`` or ``ffn=0.25,heads=1/3``."""
    pairs: dict[str, str] = {}
    for word in (part.strip() for text in words for part in text.split(",")):
        key, equals, number = word.partition("=")
        if not (key and equals and number):
            raise RecipeError(
                f"'{word}' is not of the form name=number",
                where=f"--{goal}",
                hint=f"write --{goal} {'params' if goal == 'target' else 'ffn'}=0.5",
            )
        if key in pairs:
            raise RecipeError(f"'{key}' is given twice", where=f"--{goal}")
        pairs[key] = number
    return pairs
