"""Scores, one a file, found by name in this registry.

Other packages add scores with an entry point of the group ``graphprune.scores`` whose name is the
score's and whose value is its class. Nothing here imports torch before a class is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphprune.errors import PlanError
from graphprune.registry import Registry

if TYPE_CHECKING:
    from graphprune.passes.shared.score import Score

__all__ = ["SCORES", "get_score"]

_HERE = "graphprune.passes.scores"

SCORES: Registry[Score] = Registry(
    "score",
    "graphprune.scores",
    {
        "block-influence": f"{_HERE}.block_influence:BlockInfluence",
        "element-mix": f"{_HERE}.llm_pruner:ElementMix",
        "element1": f"{_HERE}.llm_pruner:Element1",
        "element2": f"{_HERE}.llm_pruner:Element2",
        "flap": f"{_HERE}.flap:Flap",
        "loss-greedy": f"{_HERE}.loss_greedy:LossGreedy",
        "magnitude": f"{_HERE}.magnitude:Magnitude",
        "minitron": f"{_HERE}.minitron:Minitron",
        "obs": f"{_HERE}.obs:Obs",
        "random": f"{_HERE}.random_score:Random",
        "reap": f"{_HERE}.reap:Reap",
        "span-influence": f"{_HERE}.span_influence:SpanInfluence",
        "taylor": f"{_HERE}.taylor:Taylor",
        "vector": f"{_HERE}.llm_pruner:Vector",
        "wanda-sp": f"{_HERE}.wanda_sp:WandaSP",
    },
    blind=frozenset({"magnitude", "random"}),
    assumed=False,
)


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
    name = str(options.pop("name", None))
    try:
        return SCORES.build(name, options)
    except ValueError as error:
        raise PlanError(str(error)) from error
