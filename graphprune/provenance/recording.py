"""The files beside a written model: its plan, its recipe, and its report as data and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from graphprune.analysis.program import BaseProgram
from graphprune.emit.target import Target
from graphprune.plan.plan import Plan
from graphprune.provenance.card import CARD_FILE, model_card
from graphprune.provenance.making import Making
from graphprune.provenance.resolved import resolved
from graphprune.recipe.recipe import Recipe
from graphprune.report.html.compiled import compiled_page
from graphprune.report.report import Report


def record(
    folder: Path,
    target: Target,
    making: Making,
    report: Report,
    *,
    recipe: Recipe,
    plan: Plan,
    program: BaseProgram,
    auto: bool,
    tell: Callable[[str], None],
) -> Report:
    """Write them.

    Args:
        folder: where the model was written to.
        target: what the files are called.
        making: what the run was told, and what it has read.
        report: all that was measured.
        recipe: with a score and a repair in place of ``auto``.
        plan: what stays, for the model as it was loaded or with biases.
        program: the model as it was loaded.
        auto: whether the score was left to us.
        tell: told how far the hashes are.

    Returns:
        The report as it was written.

    Raises:
        LoadError: what was read can't be read any more.
    """
    tell("hashing what was read")
    # Also where biases were added: what stays is told in terms of what was read.
    plan = replace(plan, fingerprint=program.fingerprint).noted(program)
    report = replace(report, provenance=making.provenance(program, recipe, report, tell))
    text = resolved(recipe, target.formats, making, plan, program, auto)
    report = replace(report, recipe=text, sweep=making.sweep)
    told = report.to_json()
    plan.save(folder / target.name("plan"))
    (folder / target.name("recipe")).write_text(text, encoding="utf-8")
    (folder / target.name("report")).write_text(told, encoding="utf-8")
    (folder / target.name("page")).write_text(compiled_page(json.loads(told)), encoding="utf-8")
    if "hf" in target.formats:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        source = program.source.path if program.source is not None else None
        card = model_card(json.loads(told), config, None if source is None else Path(source))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return report
