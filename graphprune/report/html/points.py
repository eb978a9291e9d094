"""The curve of a sweep: what each size costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphprune.report.html.curve import Mark, chart
from graphprune.report.html.markup import Markup, number, percent, section, table, tag

Data = Mapping[str, Any]

_QUALITY = {
    "perplexity_ratio": ("perplexity ratio", True, "{:.3f}"),
    "agreement": ("top-1 agreement", False, "{:.1%}"),
    "kl": ("KL, nats", True, "{:.3f}"),
    "error": ("refit error", False, "{:.4f}"),
}


def curve_part(sweep: Data) -> Markup:
    """The curve with its table.

    Args:
        sweep: ``rows``, one for each point, and ``suggestion``.
    """
    rows, suggestion = sweep["rows"], sweep["suggestion"]
    across, named = _across(rows)
    charts = [
        _chart(rows, suggestion["label"], name, across, named)
        for name in ("perplexity_ratio", "error")
        if any(one.get(name) is not None for one in rows)
    ][:1]
    told = tag("p", tag("b", suggestion["reason"] or "nothing is suggested"))
    return section("The curve", told, *charts, _table(rows))


def _across(rows: Sequence[Data]) -> tuple[str, str]:
    """What tells the points of a sweep apart by size, and what it is called."""
    if any(one.get("zeros") for one in rows):
        return "weights_kept", "share of the weights that aren't zero"
    if len({one["parameters"] for one in rows}) == 1:
        return "macs_kept", "share of MACs"
    return "parameters_kept", "share of parameters"


def _chart(
    rows: Sequence[Data], suggested: str | None, name: str, across: str, named: str
) -> Markup:
    title, logarithmic, form = _QUALITY[name]
    curves: dict[str, list[Mark]] = {}
    for one in rows:
        if one.get(name) is not None and one.get(across) is not None:
            intervals = name == "perplexity_ratio"
            curves.setdefault(one["series"] or "points", []).append(
                Mark(
                    one[across],
                    one[name],
                    f"{one['label']}: {form.format(one[name])}",
                    one.get("ratio_low") if intervals else None,
                    one.get("ratio_high") if intervals else None,
                    one["label"] == suggested,
                )
            )
    for marks in curves.values():
        marks.sort(key=lambda mark: mark.x)
        if name == "perplexity_ratio":
            marks.append(Mark(1.0, 1.0, "the dense model"))
    return chart(curves, named, title, logarithmic=logarithmic, percent=True)


def _table(rows: Sequence[Data]) -> Markup:
    known = {name: one for name, one in _QUALITY.items()
             if any(row.get(name) is not None for row in rows)}  # fmt: skip
    faster = any(row.get("speedup") for row in rows)
    quality = [title for title, _, _ in known.values()]
    last = ["faster"] if faster else []
    titles = ["point", "parameters", "of dense", "MACs", *quality, *last]
    cells = [
        (
            row["label"],
            number(row["parameters"]),
            percent(row["parameters_kept"]),
            percent(row["macs_kept"]),
            *("–" if row.get(name) is None else form.format(row[name])
              for name, (_, _, form) in known.items()),
            *((f"{row['speedup']:.2f}×" if row.get("speedup") else "–",) if faster else ()),
        )
        for row in rows
    ]  # fmt: skip
    return table(titles, cells)
