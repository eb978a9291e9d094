"""Names: of the files that lie beside a written model, and of layers in those of parameters."""

from __future__ import annotations

import re
from pathlib import Path

PLAN_FILE = "graphprune_plan.json"
REPORT_FILE = "report.json"
RECIPE_FILE = "recipe.yaml"
PAGE_FILE = "report.html"
COMPANIONS = {
    "plan": PLAN_FILE,
    "report": REPORT_FILE,
    "recipe": RECIPE_FILE,
    "page": PAGE_FILE,
}
"""In a directory; beside a model that is a file, they have its name in front."""


def beside(path: Path, kind: str) -> Path:
    """One of `COMPANIONS` that belongs to a written directory or file."""
    default = COMPANIONS[kind]
    return path / default if path.is_dir() else path.with_name(f"{path.name}.{default}")


_LAYER = re.compile(r"(?:^|[./])(\d+)(?:[./]|$)")


def layer_of(name: str) -> str:
    """The first number in a dotted name, "12" of ``model.layers.12.mlp``; "" where it has none."""
    found = _LAYER.search(name.partition(":")[0])
    return found[1] if found else ""
