"""A sweep on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.sweep.result import Sweep


def render(sweep: Sweep) -> RenderableType:
    """Returns a row for each point, with the columns that say something, and the suggestion."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [one.row(sweep.before) for one in sweep.points]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("point")
    columns = [(title, show) for title, show in _COLUMNS.items() if any(map(show, rows))]
    for title, _ in columns:
        table.add_column(title, justify="right")
    for row in rows:
        chosen = row["label"] == sweep.suggestion.label
        cells = [show(row) or "-" for _, show in columns]
        table.add_row(Text(row["label"]), *cells, style="bold" if chosen else "")
    lines = [Text(f"note: {note}") for note in sweep.notes]
    return Group(table, *_sensitivity(sweep), *lines, Text(sweep.suggestion.reason))


def _sensitivity(sweep: Sweep) -> list[RenderableType]:
    """The structures that cost most, and least."""
    from rich.text import Text

    found = sorted(sweep.sensitivity, key=lambda one: one.change if one.kl is None else one.kl)
    if not found:
        return []
    told = [
        f"{one.role or 'structure'} {f'of layer {one.layer}' if one.layer else one.structure} "
        f"({one.change if one.kl is None else one.kl:.3g})"
        for one in found
    ]
    what = "relative change of the outputs" if found[0].kl is None else "KL in nats"
    return [
        Text(f"each alone ({what}): most: {', '.join(told[:-6:-1])}"),
        Text(f"least: {', '.join(told[:5])}"),
    ]


def _percent(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row[name] is None else f"{100 * row[name]:.1f} %"


def _ratio(row: Mapping[str, Any]) -> str:
    value = row["perplexity_ratio"]
    if value is None:
        return ""
    shown = f"{value:.3f}" if value < 100 else f"{value:.3g}"
    if row["ratio_low"] is None:
        return shown
    return f"{shown} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"


_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "parameters": lambda row: f"{row['parameters']:,}" if row["parameters"] else "",
    "of dense": _percent("parameters_kept"),
    "MACs of dense": _percent("macs_kept"),
    "zero": _percent("zeros"),
    "perplexity ratio": _ratio,
    "agreement": _percent("agreement"),
    "KL, nats": lambda row: "" if row["kl"] is None else f"{row['kl']:.3f}",
    "faster": lambda row: f"{row['speedup']:.2f}x" if row["speedup"] else "",
    "refit error": lambda row: "" if row["error"] is None else f"{row['error']:.4f}",
}
