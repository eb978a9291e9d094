"""What a sweep varies, from the words of the command line to the flags of each point."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphprune.errors import RecipeError
from graphprune.recipe.selection import WHAT

METHODS = ("score", "repair", "effort", "method")
"""Axes of words; ``method`` is that of masks."""

USUAL = {"target": ["params=0.9,0.8,0.7,0.6"]}
"""What is swept where nobody says."""


@dataclass(frozen=True)
class Setting:
    """One point of a sweep, as flags.

    Attributes:
        size: what goes, in words: "params=0.8", "50% zero"; "" where it is the same everywhere.
        series: by what, where that varies: "score flap"; points of one series make a curve.
        flags: of `graphprune.recipe.flags.with_flags`.
    """

    size: str
    series: str
    flags: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Both."""
        return ", ".join(word for word in (self.series, self.size) if word) or "as the recipe says"


def settings(
    goals: Mapping[str, Sequence[str] | None],
    words: Mapping[str, str | None],
    sparsity: str | None = None,
) -> tuple[Setting, ...]:
    """Every combination of what is to vary.

    Args:
        goals: remove, target or shape to words such as ``ffn=10%,20%``. Keys with several values
            move together, and have as many.
        words: `METHODS` to names, ``obs,flap``.
        sparsity: fractions of weights that become zero, ``50%,60%``.

    Raises:
        RecipeError: a word is not ``name=number``, or keys have different numbers of values.
    """
    given = {name: found for name, found in goals.items() if found}
    if len(given) > 1:
        raise RecipeError(
            "a sweep varies one goal", where=" and ".join(f"--{name}" for name in given)
        )
    sizes = [choice for name, found in given.items() for choice in _sizes(name, found)]
    shares = [("", {})] if sparsity is None else _shares(sparsity)
    series = _series({name: found for name, found in words.items() if found})
    several = len(sizes) > 1 or len(shares) > 1
    found = []
    for (named, methods), (told, goal), (share, masks) in itertools.product(
        series, sizes or [("", {})], shares
    ):
        flags: dict[str, object] = {**methods, **goal}
        section = {**_masks(methods), **masks}
        if section:
            flags["sparsify"] = section
        flags.pop("method", None)
        size = ", ".join(word for word in (told, share) if word) if several else ""
        found.append(Setting(size or told or share, named, flags))
    return tuple(found)


def _sizes(name: str, texts: Sequence[str]) -> list[tuple[str, dict[str, object]]]:
    """The values of a goal, each in words and as a flag."""
    values = _values(name, texts)
    counts = {len(found) for found in values.values() if len(found) > 1}
    if len(counts) > 1:
        raise RecipeError(
            "what moves together has as many values",
            where=f"--{name}",
            why=", ".join(f"{key} has {len(found)}" for key, found in values.items()),
            hint=f"give each as many, or one: --{name} ffn=10%,20%,heads=0.1,0.2",
        )
    points = []
    for index in range(max(counts, default=1)):
        pairs = [f"{key}={found[index if len(found) > 1 else 0]}" for key, found in values.items()]
        points.append((", ".join(pairs), {name: pairs}))
    return points  # type: ignore[return-value]  # dicts of another value type


def _values(name: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Reads ``ffn=10%,20%,heads=1/3``: a word without ``=`` is another value of the key before."""
    assert name in WHAT
    found: dict[str, list[str]] = {}
    for text in texts:
        key = ""
        for word in (part.strip() for part in text.split(",")):
            before, equals, value = word.rpartition("=")
            if equals:
                key = before.strip()
                if key in found:
                    raise RecipeError(f"'{key}' is given twice", where=f"--{name}")
                found[key] = []
            if not key or not value.strip():
                form = "params=0.9,0.8" if name == "target" else "ffn=0.2,0.4"
                raise RecipeError(
                    f"'{word}' is not of the form name=number",
                    where=f"--{name}",
                    hint=f"write --{name} {form}",
                )
            found[key].append(value.strip())
    return found


def _shares(text: str) -> list[tuple[str, dict[str, object]]]:
    return [(f"{one} zero", {"sparsity": one}) for one in _listed("sparsity", text)]


def _series(words: Mapping[str, str]) -> list[tuple[str, dict[str, object]]]:
    """Every combination of methods, in words and as flags."""
    choices = [[(name, one) for one in _listed(name, text)] for name, text in words.items()]
    varied = {found[0][0] for found in choices if len(found) > 1}
    return [
        (", ".join(f"{_told(name)}{one}" for name, one in chosen if name in varied), dict(chosen))
        for chosen in itertools.product(*choices)
    ]


def _masks(methods: Mapping[str, object]) -> dict[str, object]:
    return {"method": methods["method"]} if "method" in methods else {}


def _told(name: str) -> str:
    return "" if name == "method" else f"{name} "


def _listed(name: str, text: str) -> list[str]:
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise RecipeError(f"'{text}' has an empty word", where=f"--{name}")
    twice = next((word for word in found if found.count(word) > 1), None)
    if twice is not None:
        raise RecipeError(f"'{twice}' is given twice", where=f"--{name}")
    return found
