"""``graphprune report``: the page of an output, made anew from its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from graphprune.cli.shown import show
from graphprune.errors import LoadError


def report(
    output: Annotated[
        Path, typer.Argument(help="What `graphprune compile` or `graphprune sweep` wrote.")
    ],
    to: Annotated[
        Path | None, typer.Option("--output", "-o", help="Another place for the page.")
    ] = None,
) -> None:
    """Write report.html again from report.json, or from the sweep.json of a sweep."""
    from graphprune.files import write_text
    from graphprune.provenance.swept import SWEEP_FILE
    from graphprune.report.html.compiled import compiled_page
    from graphprune.report.html.swept import swept_page
    from graphprune.report.names import beside

    swept = output / SWEEP_FILE
    source = swept if swept.is_file() else beside(output, "report")
    data = _read(source)
    try:
        page = swept_page(data) if source == swept else compiled_page(data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise LoadError(
            "the report lacks what a page needs",
            where=str(source),
            why=f"{type(error).__name__}: {error}",
            hint="it may be of another version: compile again",
        ) from error
    place = to or beside(output, "page")
    write_text(place, page)
    show(f"written: {place}\n")


def _read(path: Path) -> Mapping[str, Any]:
    """The data of a report.

    Raises:
        LoadError: it is missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(
            "the report can't be read",
            where=str(path),
            why=str(error),
            hint="give the directory or file that compile wrote",
        ) from error
    if not isinstance(data, dict):
        raise LoadError("the report is no JSON object", where=str(path))
    return data
