"""The built-in text: documents of several kinds, in the public domain or written for this.

What a model is calibrated on is what it stays good at, so that the text has many kinds of little
each rather than much of one. `SOURCES.md` beside this file names where each document is from.

A file ``KIND.txt`` holds the documents of a kind. Each begins with a line ``@@@@ name``, which is
no part of it.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from importlib.resources import files

from graphprune.errors import LoadError

MARK = "@@@@ "
"""How the line begins that names a document."""

KINDS = (
    "prose",
    "dialogue",
    "encyclopaedia",
    "code",
    "manuals",
    "mathematics",
    "news",
    "lists",
)
"""The kinds, in the order in which their first documents come."""


def kinds() -> tuple[str, ...]:
    """Returns the names of the kinds of text that there are."""
    return KINDS


@cache
def documents(kind: str) -> dict[str, str]:
    """Returns the documents of a kind by their names, in order, without blank lines around them.

    Raises:
        LoadError: There is no such kind.
    """
    if kind not in KINDS:
        raise LoadError(
            "the built-in text has no such kind",
            where=kind,
            hint=f"the kinds are {', '.join(KINDS)}",
        )
    raw = files(__name__).joinpath(f"{kind}.txt").read_bytes().decode("utf-8")
    found: dict[str, str] = {}
    for part in f"\n{raw}".replace("\r\n", "\n").split(f"\n{MARK}")[1:]:
        name, _, text = part.partition("\n")
        found[name] = text.strip("\n")
    return found


def builtin_text(kind: str | None = None) -> str:
    """Returns the built-in text, its documents joined by blank lines.

    Args:
        kind: Which of `kinds`; None for all of them. They are then mixed document by document, so
            that any long piece has about as much of each kind, by characters, as the whole.

    Raises:
        LoadError: There is no such kind.
    """
    if kind is not None:
        return "\n\n".join(documents(kind).values())
    return "\n\n".join(text for _, text in sorted_documents())


def sorted_documents() -> list[tuple[str, str]]:
    """Returns the kind and the text of every document, in the order of `builtin_text`."""
    placed: list[tuple[Fraction, int, str, str]] = []
    for rank, kind in enumerate(KINDS):
        texts = documents(kind).values()
        total = sum(len(text) for text in texts)
        before = 0
        for text in texts:
            placed.append((Fraction(before, total), rank, kind, text))
            before += len(text)
    placed.sort(key=lambda item: item[:2])  # exact, so that no platform has an order of its own
    return [(kind, text) for _, _, kind, text in placed]
