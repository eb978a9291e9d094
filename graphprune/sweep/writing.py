"""The files of a sweep."""

from __future__ import annotations

from pathlib import Path

from graphprune.provenance.swept import SWEEP_FILE
from graphprune.report.html.swept import swept_page
from graphprune.report.names import PAGE_FILE, RECIPE_FILE
from graphprune.sweep.result import Sweep

RESULT = SWEEP_FILE
TABLE = "sweep.csv"


def write(folder: Path, sweep: Sweep) -> None:
    """Write the result, the table, the page, and the suggested recipe, if there is one.

    Args:
        folder: an empty directory.
        sweep: what was found.
    """
    (folder / RESULT).write_text(sweep.to_json(), encoding="utf-8")
    (folder / TABLE).write_text(sweep.to_csv(), encoding="utf-8")
    (folder / PAGE_FILE).write_text(swept_page(sweep.as_data()), encoding="utf-8")
    if sweep.suggestion.recipe:
        head = f"# {sweep.suggestion.reason}\n"
        (folder / RECIPE_FILE).write_text(head + sweep.suggestion.recipe, encoding="utf-8")
