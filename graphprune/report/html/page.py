"""A whole page."""

from __future__ import annotations

from collections.abc import Iterable

from graphprune._version import __version__
from graphprune.report.html.markup import Markup, tag, text
from graphprune.report.html.style import STYLE

_NO_ICON = "data:,"
"""Otherwise browsers ask for one beside the file, and tell that there is none."""


def page(title: str, lead: str, parts: Iterable[Markup]) -> str:
    """One HTML file.

    Args:
        title: of the page.
        lead: a sentence under it.
        parts: what is on it.
    """
    head = "".join([
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="graphprune {text(__version__)}">',
        f'<link rel="icon" href="{_NO_ICON}">',
        tag("title", title),
        f"<style>{STYLE}</style>",
    ])  # fmt: skip
    body = tag("body", tag("header", tag("h1", title), tag("p", lead, class_="note")),
               tag("main", *parts))  # fmt: skip
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n{body}\n</html>\n'
