"""Pieces of HTML. Every text goes through `text`, so that none of it is taken for markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Cell = str | Markup


def text(value: object) -> Markup:
    """A value as HTML text; what can't be printed is shown by its code."""
    if isinstance(value, Markup):
        return value
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(value))
    return Markup(html.escape(shown, quote=True))


def tag(name: str, *inner: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        inner: texts, which are escaped, and markup.
        attributes: None leaves one out; ``class_`` is class, and ``_`` becomes ``-``.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{told}>{''.join(map(text, inner))}</{name}>")


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> Markup:
    """A table whose first columns are words and the others numbers.

    Args:
        titles: of the columns.
        rows: their cells.
        words: how many columns hold words, from the left.
    """
    head = [tag("th", title, class_=None if n < words else "n") for n, title in enumerate(titles)]
    body = [
        tag("tr", *(tag("td", cell, class_=None if n < words else "n")
                    for n, cell in enumerate(row)))
        for row in rows
    ]  # fmt: skip
    inner = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", inner, class_="wide")


def section(title: str, *inner: object, note: str | None = None) -> Markup:
    """A part of a page under a heading."""
    told = tag("p", note, class_="note") if note else Markup("")
    return tag("section", tag("h2", title), told, *inner)


def listed(items: Iterable[object]) -> Markup:
    """A list; nothing for no items."""
    found = [tag("li", item) for item in items]
    return tag("ul", *found) if found else Markup("")


def number(value: float | int | None, digits: int = 2) -> str:
    """A number as people read it; "–" where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.2e}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"
