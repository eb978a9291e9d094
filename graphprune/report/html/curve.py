"""A line chart as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphprune.report.html.markup import Markup, tag, text

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44
COLOURS = "abcdef"


@dataclass(frozen=True)
class Mark:
    """A point of a curve.

    Attributes:
        x: where.
        y: likewise; not finite leaves it out.
        told: what it says when it is pointed at.
        low: where its interval begins.
        high: where it ends.
        strong: whether it stands out.
    """

    x: float
    y: float
    told: str = ""
    low: float | None = None
    high: float | None = None
    strong: bool = False


def chart(
    curves: Mapping[str, Sequence[Mark]],
    across: str,
    up: str,
    *,
    logarithmic: bool = False,
    percent: bool = False,
    dots: bool = True,
) -> Markup:
    """Draw curves over one pair of axes.

    Args:
        curves: by what they are called, from left to right.
        across: what the horizontal axis is.
        up: what the vertical one is.
        logarithmic: whether it is logarithmic; values must be positive then.
        percent: whether what is across are fractions to be shown in percent.
        dots: whether marks have dots.

    Returns:
        A figure; nothing where there is no point.
    """
    found = {
        name: [m for m in marks if math.isfinite(m.y) and (m.y > 0 or not logarithmic)]
        for name, marks in curves.items()
    }
    every = [mark for marks in found.values() for mark in marks]
    if not every:
        return Markup("")
    frame = _Frame.around(every, logarithmic)
    parts = [*_grid(frame, percent), *_titles(across, up)]
    for number, (name, marks) in enumerate(found.items()):
        parts += _drawn(frame, marks, COLOURS[number % len(COLOURS)], dots=dots)
        if len(found) > 1:
            parts += _legend(number, name)
    height = HEIGHT + (18 * len(found) if len(found) > 1 else 0)
    label = f"{up} by {across}"
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)
    return tag("figure", svg, class_="chart", style="margin: .5rem 0")


@dataclass(frozen=True)
class _Frame:
    """The values at the edges."""

    left: float
    right: float
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def around(cls, marks: Sequence[Mark], logarithmic: bool) -> _Frame:
        xs = [mark.x for mark in marks]
        ys = [y for m in marks for y in (m.y, m.low, m.high) if y is not None and math.isfinite(y)]
        if logarithmic:
            ys = [y for y in ys if y > 0]
        low, high = min(ys), max(ys)
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 1.1, high * 1.1) if logarithmic else (low - pad, high + pad)
        left, right = min(xs), max(xs)
        if left == right:
            left, right = left - 0.5, right + 0.5
        return cls(left, right, low, high, logarithmic)

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)

    def y(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - 6 - share * (HEIGHT - TOP - BOTTOM - 12)


def _grid(frame: _Frame, percent: bool) -> list[Markup]:
    parts = []
    for value in _ticks(frame.low, frame.high, frame.logarithmic):
        y = round(frame.y(value), 1)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis"))
        parts.append(tag("text", _short(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in _ticks(frame.left, frame.right, False):
        x = round(frame.x(value), 1)
        shown = f"{100 * value:g} %" if percent else _short(value)
        parts.append(tag("text", shown, x=x, y=HEIGHT - BOTTOM + 14, text_anchor="middle"))
    return parts


def _titles(across: str, up: str) -> list[Markup]:
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    down = TOP + (HEIGHT - TOP - BOTTOM) / 2
    return [
        tag("text", across, x=middle, y=HEIGHT - BOTTOM + 32, text_anchor="middle"),
        tag("text", up, x=12, y=down, text_anchor="middle", transform=f"rotate(-90 12 {down:g})"),
    ]


def _drawn(frame: _Frame, marks: Sequence[Mark], colour: str, *, dots: bool) -> list[Markup]:
    places = [(round(frame.x(m.x), 1), round(frame.y(m.y), 1)) for m in marks]
    line = " ".join(f"{x},{y}" for x, y in places)
    parts = [tag("polyline", points=line, class_=f"curve {colour}", style="fill: none")]
    for mark, (x, y) in zip(marks, places, strict=True):
        if mark.low is not None and mark.high is not None:
            ends = (round(frame.y(mark.low), 1), round(frame.y(mark.high), 1))
            parts.append(tag("line", x1=x, x2=x, y1=ends[0], y2=ends[1], class_=colour))
        if dots or mark.strong:
            told = tag("title", mark.told) if mark.told else ""
            size = 6 if mark.strong else 3.5
            parts.append(tag("circle", told, cx=x, cy=y, r=size, class_=colour))
    return parts


def _legend(number: int, name: str) -> list[Markup]:
    y = HEIGHT + 10 + 18 * number
    colour = COLOURS[number % len(COLOURS)]
    return [
        tag("circle", cx=LEFT + 6, cy=y - 4, r=4, class_=colour),
        tag("text", text(name), x=LEFT + 16, y=y),
    ]


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers between two values, about five of them."""
    if logarithmic and high / low > 3:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few: tuple[float, ...] = (1.0,)
        if high / low < 10:
            few = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        elif high / low < 1000:
            few = (1.0, 2.0, 5.0)
        found = [m * 10.0**p for p in powers for m in few]
        inside = [v for v in found if low * 0.999 <= v <= high * 1.001]
        return inside[:: max(1, len(inside) // 7)]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}"
    return f"{value:,.4g}"
