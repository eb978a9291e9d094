"""The quality of language models as a table with a row for each text, and completions under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from graphprune.quality.result import Completion, Estimate, Quality

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.quality.measures import Measures

_LINE = 160
"""Characters of a completion that are shown."""


def quality_table(
    before: Measures,
    after: Measures | None,
    quality: Quality | None,
    titles: tuple[str, str] = ("dense", "slim"),
) -> list[RenderableType]:
    """Return what there is to show of one or two language models; nothing for others.

    Args:
        before: of the first model.
        after: of the second; None where there is one.
        quality: of both.
        titles: what they are called.
    """
    shown: list[RenderableType] = []
    found = after if after is not None and after.perplexities else before
    if found.perplexities:
        shown += _texts(before, after, quality, titles)
    if quality is not None and quality.completions:
        shown += _completions(quality.completions, titles)
    return shown


def _texts(
    before: Measures, after: Measures | None, quality: Quality | None, titles: tuple[str, str]
) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("perplexity on", overflow="fold")
    for title in ("windows", *(titles if after else titles[:1])):
        table.add_column(title, justify="right", overflow="fold")
    texts = {} if quality is None else dict(quality.texts)
    if texts:
        for title in ("ratio (95 %)", "top-1 agreement", "KL, nats"):
            table.add_column(title, justify="right")
    sides = [before, after] if after else [before]
    for text in dict.fromkeys(name for side in sides for name in side.perplexities):
        taken = [side.perplexities.get(text) for side in sides]
        first = next(one for one in taken if one is not None)
        cells = ["-" if one is None else _number(one.value) for one in taken]
        if (one := texts.get(text)) is not None:
            cells += [_ratio(one.ratio), _percent(one.agreement), _plain(one.kl)]
        table.add_row(Text(text), f"{first.windows} x {first.length}", *cells)
    lines: list[RenderableType] = [table]
    everything = [one for side in sides for one in side.perplexities.values()]
    if not all(one.meaningful for one in everything):
        size = f"{everything[0].vocabulary:,}"
        lines.append(Text(f"a perplexity above the vocabulary ({size}) is worse than guessing"))
    return lines


def _completions(
    completions: tuple[Completion, ...], titles: tuple[str, str]
) -> list[RenderableType]:
    from rich.text import Text

    lines = []
    width = max(map(len, titles))
    for one in completions:
        lines.append(Text(f"{one.prompt} ...", style="bold"))
        for title, text in zip(titles, (one.dense, one.slim), strict=True):
            if text is not None:
                lines.append(Text(f"  {title:{width}}  {' '.join(text.split())[:_LINE]}"))
    return list(lines)


def _with_interval(found: Estimate | None, shown: Callable[[float], str]) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return shown(found.value)
    return f"{shown(found.value)} ({shown(found.low)} to {shown(found.high)})"


def _ratio(found: Estimate | None) -> str:
    return _with_interval(found, lambda value: f"{value:.3f}" if value < 100 else f"{value:.3g}")


def _percent(found: Estimate | None) -> str:
    return _with_interval(found, lambda value: f"{100 * value:.1f} %")


def _plain(found: Estimate | None) -> str:
    return _with_interval(found, lambda value: f"{value:.3f}")


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e7 else f"{value:.2e}"
