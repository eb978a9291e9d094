"""What became of each layer: units that stay, errors, and losses while training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphprune.report.html.curve import Mark, chart
from graphprune.report.html.heat import heat_map
from graphprune.report.html.markup import Markup, number, percent, section, table, tag
from graphprune.report.names import layer_of

Data = Mapping[str, Any]
_POINTS = 240
"""Points of a curve of losses: more can't be seen."""


def kept_part(report: Data) -> Iterator[Markup]:
    """Units that stay, by role and by layer."""
    kept = report.get("kept") or {}
    if not kept:
        return
    rows = [(role, number(size), number(count), percent(count / size if size else None))
            for role, (count, size) in kept.items()]  # fmt: skip
    values: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for one in report.get("structures") or ():
        key = (one["role"] or "no role", one["layer"])
        values.setdefault(key, []).append((one["count"], one["size"]))
    shares = {key: sum(c for c, _ in found) / max(1, sum(s for _, s in found))
              for key, found in values.items()}  # fmt: skip
    told = {
        (role, layer): f"{role}{f', layer {layer}' if layer else ''}: {100 * share:.1f} % stay"
        for (role, layer), share in shares.items()
    }
    yield section(
        "What stays",
        table(("role", "units", "stay", ""), rows),
        heat_map(shares, told, "share of units that stays, by role and layer", most=1.0),
        note="The stronger the colour, the more of the units of that role stay in that layer.",
    )


def error_parts(report: Data) -> Iterator[Markup]:
    """Errors of refitted and of masked layers."""
    refits = report.get("refits")
    if refits and refits.get("layers"):
        layers = refits["layers"]
        marks = {
            "before refitting": _errors(layers, "before"),
            "refitted": _errors(layers, "error"),
        }
        yield section(
            "Errors by layer",
            chart(marks, "layer, in the order of the model", "relative error", logarithmic=True),
            _worst([(one["parameter"], one["error"]) for one in layers]),
            note="Squared error of a layer's output on the calibration data, in parts of its "
            f"energy; {len(layers)} layers, by {refits['method']}.",
        )
    masks = report.get("masks")
    if masks and any(one.get("error") is not None for one in masks["layers"]):
        found = [one for one in masks["layers"] if one.get("error") is not None]
        marks = {"masked": _errors(found, "error")}
        yield section(
            "Errors of masked layers",
            chart(marks, "layer, in the order of treatment", "relative error", logarithmic=True),
            _worst([(one["parameter"], one["error"]) for one in found]),
            note=f"{masks['method']}: {masks['asked']}.",
        )


def loss_parts(report: Data) -> Iterator[Markup]:
    """Losses while training."""
    for one in report.get("trained") or ():
        losses = (one.get("figures") or {}).get("losses") or ()
        if losses and all(isinstance(loss, int | float) for loss in losses):
            curve = chart({"loss": _thinned(losses)}, "step", "loss", dots=False)
            yield section(f"Training: {one['method']}", tag("p", one["told"]), curve)
        elif one.get("told"):
            yield section(f"Training: {one['method']}", tag("p", one["told"]))


def _errors(layers: Sequence[Data], key: str) -> list[Mark]:
    return [
        Mark(float(place), float(one[key]), f"{one['parameter']}: {one[key]:.4g}")
        for place, one in enumerate(layers, 1)
    ]


def _worst(found: Sequence[tuple[str, float]]) -> Markup:
    """The layers with the largest errors, whose names a chart has no room for."""
    rows = sorted(found, key=lambda one: -one[1])[:5]
    shown = [(name, layer_of(name) or "–", f"{error:.4f}") for name, error in rows]
    return table(("largest errors", "layer", "error"), shown)


def _thinned(losses: Sequence[float]) -> list[Mark]:
    """Means of neighbouring losses, from which a curve can be seen."""
    step = max(1, -(-len(losses) // _POINTS))
    found = []
    for start in range(0, len(losses), step):
        part = losses[start : start + step]
        found.append(Mark(float(start + len(part)), sum(part) / len(part)))
    return found
