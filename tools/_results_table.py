"""docs/results.md from the measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from _results_rows import DEPTH, MASKED, WIDTH, Row
from _tables import table

HEAD = """# Results

<!-- tools/results -->

SmolLM2-135M-Instruct in float32 on WikiText-2 (raw text, tokenised once without special tokens,
non-overlapping windows of 512 tokens): calibration on the first 64 windows of the validation text,
perplexity, the exponential of the mean loss of a token, on the first 64 of the test text. No
training. *Original* is the code that its authors published, where it was run on this protocol.
*Passes* is processor time in units of one evaluation of 64 windows on the same machine.
"""
SECTIONS = {
    MASKED: (
        "Masks",
        "All weights of the decoder layers; each reads what the layers before it, pruned, compute. "
        "*Error* is the mean relative error of a weight's output.",
        ("mask", "method", "perplexity", "original", "error", "passes"),
    ),
    WIDTH: (
        "Width",
        "Equal counts in every layer. `reconstruct` refits what reads the pruned axes.",
        ("removed", "method", "perplexity", "original", "parameters", "passes"),
    ),
    DEPTH: ("Depth", "", ("removed", "method", "perplexity", "original", "layers", "passes")),
}


def page(rows: Iterable[Row], found: Mapping[str, Mapping[str, Any]]) -> str:
    """The document."""
    rows = list(rows)
    parts = [HEAD]
    dense = found.get("dense//dense")
    if dense is not None:
        parts.append(f"Dense: **{dense['perplexity']:.2f}**.\n")
    for kind, (title, text, titles) in SECTIONS.items():
        lines = [
            _line(row, found[row.key]) for row in rows if row.table == kind and row.key in found
        ]
        if lines:
            parts += [f"## {title}\n", *([text + "\n"] if text else []), table(titles, lines)]
    return "\n".join(parts)


def _line(row: Row, facts: Mapping[str, Any]) -> tuple[str, ...]:
    passes = facts["seconds"] / facts["pass_seconds"] if facts.get("pass_seconds") else None
    error = facts.get("error")
    middle = {
        MASKED: f"{error:.4f}" if error is not None else "",
        WIDTH: f"{facts['parameters'] / 1e6:.1f} M",
        DEPTH: ", ".join(map(str, facts.get("removed", ()))),
    }[row.table]
    return (
        row.target,
        row.method,
        f"{facts['perplexity']:.2f}"
        if facts["perplexity"] < 1000
        else f"{facts['perplexity']:.3g}",
        "" if row.original is None else f"{row.original:.2f}",
        middle,
        "" if passes is None else f"{passes:.1f}",
    )
