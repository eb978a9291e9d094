"""A map of role by layer as inline SVG: the darker, the more."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphprune.report.html.markup import Markup, tag

SIDE, LABELS, HEAD = 20, 118, 20
_LONG = 18


def heat_map(
    values: Mapping[tuple[str, str], float],
    told: Mapping[tuple[str, str], str],
    label: str,
    *,
    logarithmic: bool = False,
    most: float | None = None,
) -> Markup:
    """Draw a cell for each role and layer.

    Args:
        values: (role, layer) to a number of at least 0.
        told: likewise to what a cell says when it is pointed at.
        label: what is shown, for those who can't see it.
        logarithmic: whether shades go by the logarithm.
        most: what has the darkest shade; None for the largest of the values.

    Returns:
        A figure that scrolls where it is too wide; nothing for no values.
    """
    if not values:
        return Markup("")
    roles = list(dict.fromkeys(role for role, _ in values))
    layers = sorted(dict.fromkeys(layer for _, layer in values), key=_order)
    shades = _shades(values, logarithmic, most)
    parts = []
    step = max(1, len(layers) // 16)
    for column, layer in enumerate(layers):
        if column % step == 0 and layer:
            x = LABELS + SIDE * column + SIDE / 2
            parts.append(tag("text", layer, x=x, y=HEAD - 6, text_anchor="middle"))
    for row, role in enumerate(roles):
        y = HEAD + SIDE * row
        name = role if len(role) <= _LONG else f"{role[: _LONG - 1]}…"
        parts.append(tag("text", name, x=LABELS - 8, y=y + SIDE - 6, text_anchor="end",
                         class_="strong"))  # fmt: skip
        for column, layer in enumerate(layers):
            key = (role, layer)
            place = {"x": LABELS + SIDE * column, "y": y, "width": SIDE - 1, "height": SIDE - 1}
            if key in values:
                opacity = f"fill-opacity: {shades[key]:.3f}"
                title = tag("title", told.get(key, ""))
                parts.append(tag("rect", title, **place, class_="cell", style=opacity))
            else:
                parts.append(tag("rect", **place, class_="blank"))
    width, height = LABELS + SIDE * len(layers) + 4, HEAD + SIDE * len(roles) + 4
    svg = tag("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height,
              role="img", aria_label=label)  # fmt: skip
    return tag("div", svg, class_="scroll")


def _shades(
    values: Mapping[tuple[str, str], float], logarithmic: bool, most: float | None
) -> dict[tuple[str, str], float]:
    """Opacities from 0.04 to 1."""
    found = dict(values)
    if logarithmic:
        floor = min((v for v in found.values() if v > 0), default=1.0)
        found = {key: math.log(max(v, floor)) for key, v in found.items()}
    low = min(found.values()) if logarithmic else 0.0
    high = max(found.values()) if most is None else most
    span = (high - low) or 1.0
    return {key: 0.04 + 0.96 * max(0.0, (v - low) / span) for key, v in found.items()}


def _order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (-1, layer)
