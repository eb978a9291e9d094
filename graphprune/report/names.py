"""The files that lie beside a written model, by their names."""

from __future__ import annotations

from pathlib import Path

PLAN_FILE = "graphprune_plan.json"
REPORT_FILE = "report.json"
RECIPE_FILE = "recipe.yaml"
COMPANIONS = {"plan": PLAN_FILE, "report": REPORT_FILE, "recipe": RECIPE_FILE}
"""In a directory; beside a model that is a file, they have its name in front."""


def beside(path: Path, kind: str) -> Path:
    """One of `COMPANIONS` that belongs to a written directory or file."""
    default = COMPANIONS[kind]
    return path / default if path.is_dir() else path.with_name(f"{path.name}.{default}")
