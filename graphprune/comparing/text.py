"""The difference of two outputs for people to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graphprune.comparing.diff import Diff, Pair, Side

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHORT = 16
"""Characters of a hash."""


def rendered(found: Diff, first: Side, second: Side, *, verbose: bool) -> RenderableType:
    """Tables of units and of measured numbers, and what else differs.

    Args:
        found: the difference.
        first: A.
        second: B.
        verbose: also which units they are.
    """
    from rich.console import Group
    from rich.text import Text

    head = [f"A: {first.path}", f"B: {second.path}", *_about_models(found)]
    parts: list[RenderableType] = [Text(line) for line in head]
    if found.structures:
        parts.append(_units(found))
    if verbose:
        parts += [Text(line) for line in _ranges(found)]
    if found.numbers:
        parts.append(_numbers(found.numbers))
    for title, pairs in (("recipe", found.recipe), ("made with", found.provenance)):
        parts += [Text(f"{title}: {key}: {_words(a)} / {_words(b)}") for key, (a, b) in
                  pairs.items()]  # fmt: skip
    return Group(*parts)


def _about_models(found: Diff) -> Iterator[str]:
    if found.same_model:
        yield "the plans are the same" if found.same else "the plans differ"
        return
    a, b = found.fingerprints
    yield f"the plans are for different models (fingerprints {a} and {b})"
    yield f"{len(found.structures)} structures are matched by name, and compared"
    for side, names in zip("AB", found.unmatched, strict=True):
        if names:
            yield f"only in {side}: {', '.join(names)}"


def _units(found: Diff) -> Table:
    """Counts of units: of each role, and of its structures that differ."""
    table = _table("", "size", "only in A", "only in B", "in both")
    for role, counts in found.roles().items():
        own = {n: s for n, s in found.structures.items() if (s.role or "other") == role}
        changed = {name: one for name, one in own.items() if not one.same}
        total = f"{role}: {len(changed)} of {len(own)} structures differ"
        table.add_row(total, "", *(f"{count:,}" for count in counts))
        for name, one in changed.items():
            sizes = " / ".join(f"{size:,}" for size in dict.fromkeys(one.sizes))
            table.add_row(f"  {name}", sizes, *(f"{count:,}" for count in one.counts))
    return table


def _ranges(found: Diff) -> Iterator[str]:
    words = {"only_a": "only in A", "only_b": "only in B", "both": "in both"}
    for name, one in found.structures.items():
        if one.same:
            continue
        yield name
        for key, ranges in one.ranges().items():
            rows = [ranges] if isinstance(ranges, str) else ranges
            for number, row in enumerate(rows):
                of = f" {number}" if len(rows) > 1 else ""
                yield f"  {words[key]}{of}: {row or 'none'}"


def _numbers(pairs: Mapping[str, Pair]) -> Table:
    table = _table("measured", "A", "B", "B/A")
    for key, (a, b) in pairs.items():
        ratio = f"{b / a:.3f}" if a and b is not None else ""
        table.add_row(key, _number(a), _number(b), ratio)
    return table


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _words(value: Any) -> str:
    """A value of a recipe or a report; of a hash its beginning."""
    if value is None:
        return "not given"
    if isinstance(value, str):
        is_hash = len(value) == 64 and set(value) <= set("0123456789abcdef")
        return f"{value[:_SHORT]}..." if is_hash else value
    return json.dumps(value, ensure_ascii=False, default=str)
