"""Whether a dense model still is the one that an output was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphprune.analysis.program import BaseProgram
from graphprune.report.digests import source_digest


def source_change(
    report: Mapping[str, Any],
    program: BaseProgram,
    source: str,
    weights: Path | None,
    tell: Callable[[str], None],
) -> str | None:
    """What is to be said of a model whose content isn't what the report recorded.

    Args:
        report: of the output; an empty one records nothing.
        program: the dense model.
        source: what it was loaded from.
        weights: the file with the weights of a factory's module.
        tell: told how far the hashes are.

    Returns:
        None if it is the same, or the report doesn't say.

    Raises:
        LoadError: a file of the model can't be read.
    """
    provenance = report.get("provenance")
    recorded = provenance.get("source") if isinstance(provenance, dict) else None
    if not isinstance(recorded, dict) or not isinstance(recorded.get("sha256"), str):
        return None
    tell("hashing the dense model")
    found = source_digest(program, source, weights, tell)
    if found.sha256 == recorded["sha256"]:
        return None
    before, now = recorded.get("files"), found.files
    names: list[str] = []
    if isinstance(before, dict) and now is not None:
        names = sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
    which = f" ({', '.join(names)})" if names else ""
    return f"the dense model isn't what it was when this was compiled: {source}{which}"
