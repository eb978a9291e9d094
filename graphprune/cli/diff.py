"""``graphprune diff``: two plans, or two outputs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.options import Json
from graphprune.cli.shown import show

DIFFERENT, TROUBLE = 1, 2
"""Exit codes as those of ``diff``. Errors of other commands end with 1, which is taken here."""


def diff(
    first: Annotated[
        Path,
        typer.Argument(metavar="A", help="What `graphprune compile` wrote, or the file of a plan."),
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also list the units, as ranges.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare two plans or outputs: units, recipes, versions, hashes and measured numbers.

    Ends with 0 if the plans are the same, 1 if they differ, and 2 if one can't be read.
    """
    try:
        from graphprune.comparing.diff import Side, compare
        from graphprune.comparing.text import rendered

        sides = Side.read(first), Side.read(second)
        found = compare(*sides)
    except Exception as error:
        error.exit_code = TROUBLE  # type: ignore[attr-defined]  # read by graphprune.cli.app.main
        raise
    if as_json:
        show(json.dumps(found.as_data(ranges=verbose), indent=2) + "\n")
    else:
        show(rendered(found, *sides, verbose=verbose))
    if not found.same:
        raise typer.Exit(DIFFERENT)
