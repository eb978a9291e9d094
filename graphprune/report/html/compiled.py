"""The page of a compilation, from its report.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphprune.report.html.layers import error_parts, kept_part, loss_parts
from graphprune.report.html.markup import Markup, listed, number, percent, section, table, tag
from graphprune.report.html.page import page
from graphprune.report.html.points import curve_part
from graphprune.report.html.proof import proof_part

Data = Mapping[str, Any]


def compiled_page(report: Data) -> str:
    """A page of what a compilation did.

    Args:
        report: what ``report.json`` holds.
    """
    name = str(report.get("source") or "a model").rstrip("/").rpartition("/")[2]
    title = f"{name}, made smaller"
    return page(title, f"graphprune compiled {report.get('source')}", _parts(report))


def _parts(report: Data) -> Iterator[Markup]:
    yield _cards(report)
    notes = report.get("notes") or ()
    if notes:
        yield section("What to know", listed(notes))
    yield _sizes(report)
    yield from _quality(report)
    yield from _controls(report)
    if report.get("sweep"):
        yield curve_part(report["sweep"])
    yield from kept_part(report)
    yield from error_parts(report)
    yield from loss_parts(report)
    yield from proof_part(report)


def _cards(report: Data) -> Markup:
    """The few numbers that matter most."""
    before, after = report["before"], report["after"]
    cards = []
    for name, told in (("parameters", "fewer parameters"), ("macs", "fewer MACs")):
        if before.get(name) and after.get(name) is not None:
            cards.append((percent(1 - after[name] / before[name]), told))
    masks = report.get("masks") or {}
    if masks.get("sparsity_of_model") is not None:
        cards.append((percent(masks["sparsity_of_model"]), "of all weights are zero"))
    for runtime, one in _latency(report).get("speedup", {}).items():
        cards.append((f"{one['time']:.2f}×", f"as fast in {_RUNTIMES.get(runtime, runtime)}"))
    texts = (report.get("quality") or {}).get("texts") or {}
    if texts:
        worst = max(texts, key=lambda text: texts[text]["ratio"]["value"])
        cards.append((f"{texts[worst]['ratio']['value']:.2f}×", f"the perplexity on {worst}"))
    return tag("div", *(tag("div", tag("b", value), tag("span", told), class_="card")
                        for value, told in cards), class_="cards")  # fmt: skip


_RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}


def _latency(report: Data) -> Data:
    return (report.get("run") or {}).get("latency") or {}


def _sizes(report: Data) -> Markup:
    before, after = report["before"], report["after"]
    rows = []
    for name, told in (("parameters", "parameters"), ("macs", "multiply-accumulates"),
                       ("bytes", "weights, bytes"), ("files", "files, bytes")):  # fmt: skip
        one, other = before.get(name), after.get(name)
        if one is not None or other is not None:
            rows.append((told, number(one), number(other), _change(one, other)))
    latency = _latency(report)
    for runtime, told in _RUNTIMES.items():
        sides = [(latency.get(side) or {}).get(runtime) for side in ("before", "after")]
        if any(sides):
            taken = [None if s is None else 1000 * s["seconds"] for s in sides]
            rows.append((f"{told}, ms", number(taken[0]), number(taken[1]), _change(*taken)))
    shown = table(("", "dense", "slim", "change"), rows)
    return section("Before and after", shown, _bars(latency), note=_conditions(report))


def _bars(latency: Data) -> Markup:
    """Latency by runtime as bars."""
    rows = [
        (f"{told}, {title}", side[runtime]["seconds"] * 1000)
        for runtime, told in _RUNTIMES.items()
        for title, side in (("dense", latency.get("before") or {}),
                            ("slim", latency.get("after") or {}))
        if side.get(runtime)
    ]  # fmt: skip
    if not rows:
        return Markup("")
    most = max(value for _, value in rows) or 1.0
    parts = []
    for place, (told, value) in enumerate(rows):
        y = 6 + 26 * place
        colour = "a" if told.endswith("slim") else "b"
        width = max(1.0, 220 * value / most)
        parts += [
            tag("text", told, x=146, y=y + 14, text_anchor="end", class_="strong"),
            tag("rect", x=154, y=y, width=round(width, 1), height=19, class_=colour),
            tag("text", f"{value:.1f} ms", x=round(160 + width, 1), y=y + 14),
        ]
    height = 26 * len(rows) + 8
    svg = tag("svg", *parts, viewBox=f"0 0 460 {height}", role="img",
              aria_label="latency by runtime")  # fmt: skip
    return tag("figure", svg, class_="chart", style="margin: 1rem 0")


def _conditions(report: Data) -> str:
    """How sizes and latencies were taken."""
    size, latency = report["before"].get("input"), _latency(report)
    told = [f"MACs and latency are of one call with {size}"] if size else []
    both = [latency.get(name) or {} for name in ("before", "after")]
    sides = [one for side in both for one in side.values() if one]
    if sides:
        threads = max(one["threads"] for one in sides)
        repeats = min(one["repeats"] for one in sides)
        told.append(f"median of {repeats} calls or more in turns, {threads} thread"
                    f"{'s' if threads > 1 else ''}")  # fmt: skip
    return "; ".join(told) + "." if told else ""


def _quality(report: Data) -> Iterator[Markup]:
    """Both models by text, and what they say."""
    quality = report.get("quality") or {}
    sides = [report[name].get("perplexities") or {} for name in ("before", "after")]
    if any(sides):
        rows = []
        for text in dict.fromkeys([*sides[0], *sides[1]]):
            taken = [side.get(text) for side in sides]
            first = next(one for one in taken if one)
            own = (quality.get("texts") or {}).get(text) or {}
            rows.append((
                text,
                f"{first['windows']} × {first['length']}",
                *(number(None if one is None else one["value"]) for one in taken),
                _interval(own.get("ratio"), "{:.3f}"),
                _interval(own.get("agreement"), "{:.1%}"),
                _interval(own.get("kl"), "{:.3f}"),
            ))  # fmt: skip
        titles = ("text", "windows", "dense", "slim", "ratio", "top-1 agreement", "KL, nats")
        yield section(
            "Quality by text",
            table(titles, rows),
            note="Perplexities of both models on the same windows; ranges are 95 % intervals.",
        )
    pairs = quality.get("completions") or ()
    if pairs:
        shown = []
        for one in pairs:
            both = [tag("div", tag("i", name), one[name].strip()) for name in ("dense", "slim")
                    if one.get(name) is not None]  # fmt: skip
            shown.append(tag("h3", f"{one['prompt']} …"))
            shown.append(tag("div", *both, class_="pair"))
        yield section("The same prompts, continued", *shown)


def _controls(report: Data) -> Iterator[Markup]:
    controls = report.get("controls") or ()
    if controls:
        texts = list(report["before"]["perplexities"])
        rows = [
            (one["name"], *(number(one["perplexities"].get(text)) for text in texts))
            for one in controls
        ]
        yield section("Compared with", table(("perplexity of", *texts), rows))


def _interval(found: Data | None, form: str) -> str:
    if not found:
        return "–"
    if found.get("low") is None:
        return form.format(found["value"])
    low, high = form.format(found["low"]), form.format(found["high"])
    return f"{form.format(found['value'])} ({low} to {high})"


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return ""
    return f"{100 * (after / before - 1):+.1f} %"
