"""Scores, one a file, found by name in this registry.

Other packages add scores with an entry point of the group ``graphprune.passes`` whose name is the
score's and whose value is its class.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from graphprune.errors import PlanError
from graphprune.passes.scores.block_influence import BlockInfluence
from graphprune.passes.scores.flap import Flap
from graphprune.passes.scores.llm_pruner import Element1, Element2, ElementMix, Vector
from graphprune.passes.scores.loss_greedy import LossGreedy
from graphprune.passes.scores.magnitude import Magnitude
from graphprune.passes.scores.minitron import Minitron
from graphprune.passes.scores.obs import Obs
from graphprune.passes.scores.random_score import Random
from graphprune.passes.scores.reap import Reap
from graphprune.passes.scores.span_influence import SpanInfluence
from graphprune.passes.scores.taylor import Taylor
from graphprune.passes.scores.wanda_sp import WandaSP
from graphprune.passes.shared.score import Inputs, Score, needs_data

__all__ = ["GROUP", "Inputs", "Score", "get_score", "needs_data", "register", "score_names"]

GROUP = "graphprune.passes"

ScoreClass = Callable[..., Score]

_SCORES: dict[str, ScoreClass] = {}


def register(name: str, score: ScoreClass) -> None:
    """Add a score class under `name`.

    Raises:
        PlanError: the name is taken.
    """
    if name in _SCORES:
        raise PlanError(f"two scores are named {name!r}", where=f"{_SCORES[name]!r} and {score!r}")
    _SCORES[name] = score


def score_names() -> tuple[str, ...]:
    """The names of all scores, those of other packages included."""
    return tuple(sorted({*_SCORES, *_plugins()}))


def get_score(spec: str | Mapping[str, Any] | Score) -> Score:
    """The score that `spec` describes.

    Args:
        spec: a name, a mapping of ``name`` and the score's options (None leaves an option at its
            default), or a score.

    Raises:
        PlanError: no score has that name or that option.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        return spec
    options = {key: value for key, value in spec.items() if value is not None}
    name = options.pop("name", None)
    plugins = _plugins()
    if name not in _SCORES and name not in plugins:
        close = difflib.get_close_matches(str(name), score_names(), n=1, cutoff=0.5)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise PlanError(
            f"unknown score {name!r}", hint=f"{meant}the scores are {', '.join(score_names())}"
        )
    try:
        score = _SCORES[name] if name in _SCORES else plugins[name]()
    except (ImportError, AttributeError) as error:
        raise PlanError(f"score {name!r} can't be loaded", why=str(error)) from error
    if name in _SCORES:
        options = _of_their_types(score, options, str(name))
    try:
        return score(**options)
    except TypeError as error:
        raise PlanError(f"score {name!r} doesn't take these options", why=str(error)) from error


def _of_their_types(score: ScoreClass, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options of a score, as its fields have them; those that it doesn't have stay.

    Raises:
        PlanError: one is of another type.
    """
    if not (isinstance(score, type) and is_dataclass(score)):
        return dict(options)
    hints = get_type_hints(score)
    found = dict(options)
    for option, value in options.items():
        try:
            found[option] = TypeAdapter(hints.get(option, Any)).validate_python(value)
        except ValidationError as error:
            raise PlanError(
                f"{value!r} is no value of the option {option!r}",
                where=f"score {name}",
                why=error.errors()[0]["msg"],
            ) from None
    return found


def _plugins() -> dict[str, Callable[[], ScoreClass]]:
    """Loaders of the scores of other packages, by name."""
    found: dict[str, Callable[[], ScoreClass]] = {}
    for point in entry_points(group=GROUP):
        if point.name in _SCORES or point.name in found:
            raise PlanError(
                f"two scores are named {point.name!r}",
                where=f"entry point {point.value}",
                hint=f"uninstall one of the packages that define it, or rename it in {GROUP}",
            )
        found[point.name] = point.load
    return found


register("block-influence", BlockInfluence)
register("element-mix", ElementMix)
register("element1", Element1)
register("element2", Element2)
register("flap", Flap)
register("loss-greedy", LossGreedy)
register("magnitude", Magnitude)
register("minitron", Minitron)
register("obs", Obs)
register("random", Random)
register("reap", Reap)
register("span-influence", SpanInfluence)
register("taylor", Taylor)
register("vector", Vector)
register("wanda-sp", WandaSP)
