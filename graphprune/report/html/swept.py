"""The page of a sweep, from its sweep.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphprune.report.html.heat import heat_map
from graphprune.report.html.markup import Markup, listed, section, table, tag
from graphprune.report.html.page import page
from graphprune.report.html.points import curve_part

Data = Mapping[str, Any]


def swept_page(sweep: Data) -> str:
    """A page of what a sweep found.

    Args:
        sweep: what ``sweep.json`` holds.
    """
    name = str(sweep["source"]).rstrip("/").rpartition("/")[2]
    lead = f"graphprune sweep of {sweep['source']}: {len(sweep['points'])} points"
    return page(f"How much of {name} can go?", lead, _parts(sweep))


def curve_of(sweep: Data) -> dict[str, Any]:
    """What a compilation's report keeps of the sweep that its recipe comes from."""
    suggestion = {name: sweep["suggestion"][name] for name in ("label", "reason")}
    return {"rows": [one["row"] for one in sweep["points"]], "suggestion": suggestion}


def _parts(sweep: Data) -> Iterator[Markup]:
    yield curve_part(curve_of(sweep))
    if sweep.get("notes"):
        yield section("What to know", listed(sweep["notes"]))
    if sweep.get("sensitivity"):
        yield _sensitivity(sweep["sensitivity"])
    yield from _completions(sweep["points"])
    if sweep["suggestion"].get("recipe"):
        yield section("The suggested recipe", tag("pre", sweep["suggestion"]["recipe"]))
    seconds = (sweep.get("run") or {}).get("seconds") or {}
    rows = [(stage, f"{took:.1f}") for stage, took in seconds.items()]
    command = (sweep.get("run") or {}).get("command")
    told = [tag("pre", command)] if command else []
    yield section("How it was made", *told, table(("stage", "seconds"), rows))


def _sensitivity(cells: list[Data]) -> Markup:
    """What each structure alone costs, by role and layer."""
    by_kl = all(one.get("kl") is not None for one in cells)
    found: dict[tuple[str, str], list[float]] = {}
    for one in cells:
        key = (one["role"] or "no role", one["layer"])
        found.setdefault(key, []).append(one["kl"] if by_kl else one["change"])
    values = {key: max(0.0, sum(costs) / len(costs)) for key, costs in found.items()}
    unit = "KL in nats" if by_kl else "relative change of the outputs"
    told = {
        (role, layer): f"{role}{f', layer {layer}' if layer else ''}: {value:.4g} ({unit})"
        for (role, layer), value in values.items()
    }
    worst = sorted(values.items(), key=lambda item: -item[1])
    rows = [(role, layer or "–", f"{value:.4g}") for (role, layer), value in worst[:8]]
    return section(
        "Layer by layer",
        heat_map(values, told, f"{unit} where one structure alone is cut", logarithmic=True),
        table(("costliest", "layer", unit), rows, words=2),
        note="Each structure was cut alone, as much as in the smallest point, and nothing made up "
        f"for it. The stronger the colour, the more it costs ({unit}).",
    )


def _completions(points: list[Data]) -> Iterator[Markup]:
    """What every point makes of the same prompts."""
    shown: dict[str, list[Markup]] = {}
    for one in points:
        for pair in (one.get("quality") or {}).get("completions") or ():
            own = shown.setdefault(
                pair["prompt"], [tag("div", tag("i", "dense"), pair["dense"].strip())]
            )
            own.append(tag("div", tag("i", one["label"]), (pair["slim"] or "").strip()))
    if shown:
        parts = []
        for prompt, texts in shown.items():
            parts += [tag("h3", f"{prompt} …"), tag("div", *texts, class_="pair")]
        yield section("The same prompts, continued", *parts)
