"""Where a row of docs/results.md isn't in the order that one would expect, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from _results_rows import WIDTH, Row

REPAIRED = " + reconstruct"
BEST = "obs" + REPAIRED


def doubts(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A paragraph, or nothing.

    Args:
        rows: of one table.
        found: what was measured, by the key of a row. Losses of the same windows, tokens or photos
            are compared.
    """
    lines = [_line(*pair, found) for pair in _unexpected(rows, found)]
    if not lines:
        return []
    return ["Mean losses, compared in pairs (with the standard error): " + "; ".join(lines) + ".\n"]


def _unexpected(
    rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Row, Row]]:
    """A row that should have a lower loss than another, and that other."""
    known = [row for row in rows if "losses" in found.get(row.key, {})]
    for row in known:
        others = [
            other
            for other in known
            if other.target == row.target
            and row.method in (other.method + REPAIRED, BEST if row.table == WIDTH else "")
        ]
        best = min(others, key=lambda other: _mean(found[other.key]), default=row)
        if _mean(found[best.key]) < _mean(found[row.key]):
            yield row, best


def _line(row: Row, other: Row, found: Mapping[str, Mapping[str, Any]]) -> str:
    more = _losses(found[row.key]) - _losses(found[other.key])
    error = more.std(ddof=1) / len(more) ** 0.5
    return (
        f"{row.target}, *{row.method}* above *{other.method}* by {more.mean():.4f} ({error:.4f}), "
        f"{len(more)} pairs"
    )


def _losses(facts: Mapping[str, Any]) -> Any:
    return np.array(facts["losses"])


def _mean(facts: Mapping[str, Any]) -> float:
    return float(_losses(facts).mean())
