"""The recipe that an output was made of, with nothing left open, as a file to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from graphprune._version import __version__
from graphprune.analysis.program import BaseProgram
from graphprune.calibration.text.read import OWN_TEXTS, SELF
from graphprune.emit.formats import shown
from graphprune.passes.scores import get_score
from graphprune.passes.shared.judging import unjudged
from graphprune.plan.plan import Plan
from graphprune.provenance.making import Making, located
from graphprune.recipe.named import AUTO
from graphprune.recipe.recipe import Recipe

_LAST = ("calibration", "seed", "formats", "verify", "native")
"""What is behind all that says what goes, and how."""


def resolved(
    recipe: Recipe,
    formats: Sequence[str],
    making: Making,
    plan: Plan,
    program: BaseProgram,
    auto: bool,
) -> str:
    """A recipe as YAML from which the same model makes the same weights.

    Args:
        recipe: with a score and a repair in place of ``auto``.
        formats: what was written.
        making: what the run was told, and what it has read.
        plan: what stays.
        program: the dense model.
        auto: whether the score was left to us.
    """
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    shared = auto and recipe.operates and _is_shared(plan, program)
    if recipe.steps is None and recipe.removes:
        named = recipe.repair.name != AUTO
        data["repair"] = recipe.repair.model_dump(mode="json") if named else "none"
        if recipe.plan is not None:
            data.pop("score", None)
            data["plan"] = located(recipe.plan)
        elif shared:
            data |= {"score": "auto"}
        else:
            score = recipe.score.model_dump(mode="json")
            data["score"] = score["name"] if len(score) == 1 else score
    calibration = _calibration(recipe, making)
    if calibration:
        data["calibration"] = calibration
    data |= {"seed": recipe.seed, "formats": list(formats)}
    keys = [key for key in Recipe.model_fields if key in data]
    ordered = {key: data[key] for key in sorted(keys, key=_LAST.__contains__)}
    lines = [f"Made by graphprune {__version__}. To make it again, RECIPE being this file:"]
    lines += [f"  {_command(making)}", *_remarks(recipe, making, shared)]
    head = "".join(f"# {line}\n" for text in lines for line in _printable(text))
    return head + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def _is_shared(plan: Plan, program: BaseProgram) -> bool:
    """Whether other scores have chosen a part, which a recipe can't name: only auto does it."""
    chosen = [program.by_name[name] for name in plan.kept_units if name in program.by_name]
    return any(s.name in unjudged(get_score("obs"), program) for s in chosen)


def _calibration(recipe: Recipe, making: Making) -> dict[str, Any]:
    wanted = recipe.calibration
    data = wanted.model_dump(mode="json", exclude_defaults=True)
    sources = {one.source for one in making.used.values()}
    if wanted.data is None and len(sources) == 1:
        (source,) = sources
        if source in (*OWN_TEXTS, SELF, *(wanted.text or ())):
            data["data"] = source
    if isinstance(wanted.data, dict):
        data["data"] = {
            name: part.model_dump(mode="json", exclude_none=True) | {"source": located(part.source)}
            for name, part in wanted.data.items()
        }
    if wanted.text:
        data["text"] = [located(text) for text in wanted.text]
    for key in ("data", "tokenizer"):
        if isinstance(data.get(key), str):
            data[key] = located(data[key])
    return {key: data[key] for key in type(wanted).model_fields if key in data}


def _command(making: Making) -> str:
    """The command line, or the call, that makes the output again."""
    if not isinstance(making.source, str | Path):
        example = "" if isinstance(making.source, BaseProgram) else ", example=INPUTS"
        kind = type(making.source).__name__
        return f"graphprune.compile(MODEL, 'RECIPE', 'OTHER'{example})  # MODEL: a {kind} in memory"
    words = ["graphprune", "compile", shown(making.source), "RECIPE", "-o", "OTHER"]
    if making.weights is not None:
        words += ["--weights", str(Path(making.weights).absolute())]
    words += [f"--{name.replace('_', '-')}" for name, said in making.opening.items() if said]
    return shlex.join(words)


def _remarks(recipe: Recipe, making: Making, shared: bool) -> list[str]:
    """What YAML has no place for."""
    found = [f"{purpose}: {one.described}" for purpose, one in making.used.items()]
    if shared:
        found.append(f"score: auto is {recipe.score.name} where it can weigh units")
    return found


def _printable(text: str) -> list[str]:
    """Lines that may stand in a comment: no other line can begin in them."""
    lines = text.splitlines() or [""]
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines]
