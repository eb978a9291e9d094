"""What a trained model is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.quality.measures import Measures


@dataclass(frozen=True)
class Control:
    """A model that was made for comparison, and not written.

    Attributes:
        name: what was done otherwise.
        perplexities: by text, on the windows that the dense and the slim model are measured on.
    """

    name: str
    perplexities: Mapping[str, float]


def control_table(
    before: Measures, after: Measures, controls: tuple[Control, ...]
) -> list[RenderableType]:
    """A row for each model and a column for each text; nothing where there are no controls."""
    from rich.table import Table
    from rich.text import Text

    if not controls:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("perplexity of")
    texts = list(before.perplexities)
    for text in texts:
        table.add_column(Text(text), justify="right", overflow="fold")
    sides = {"the dense model": before, "the result": after}
    rows = {
        name: {text: one.value for text, one in side.perplexities.items()}
        for name, side in sides.items()
    }
    for name, found in (rows | {c.name: dict(c.perplexities) for c in controls}).items():
        table.add_row(name, *(f"{found[t]:,.2f}" if t in found else "-" for t in texts))
    return [table]
