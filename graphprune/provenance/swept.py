"""The sweep that a recipe comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphprune.report.html.swept import curve_of

SWEEP_FILE = "sweep.json"


def sweep_beside(recipe: object) -> dict[str, Any] | None:
    """What the sweep found that has written a recipe, for the curve of a report.

    Args:
        recipe: a path; anything else comes from no sweep.

    Returns:
        None where no readable result of a sweep lies beside it.
    """
    if not isinstance(recipe, str | Path):
        return None
    try:
        found = json.loads((Path(recipe).parent / SWEEP_FILE).read_text(encoding="utf-8"))
        return curve_of(found)
    except (OSError, ValueError, KeyError, TypeError):
        return None
