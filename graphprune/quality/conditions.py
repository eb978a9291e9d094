"""Conditions that end a run: ``perplexity>+50%``, ``agreement<0.9``, ``parameters>100M``.

They are parsed with the recipe, without torch, and checked before anything is put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphprune.errors import ConditionError, EvaluationError, RecipeError
from graphprune.options import nearest, parse_number

if TYPE_CHECKING:
    from graphprune.quality.measures import Measures
    from graphprune.quality.result import Quality

QUALITY = ("perplexity", "agreement", "kl")
"""Of the text on which the slim model does worst."""

SIZES = ("parameters", "macs", "bytes")
METRICS = (*QUALITY, *SIZES)

_FORM = re.compile(r"([A-Za-z][\w-]*)\s*([<>])\s*(\S.*)")
_RELATIVE = re.compile(r"[+-]\s*([0-9.]+)\s*%")


@dataclass(frozen=True)
class Condition:
    """A number that the slim model must not have.

    Attributes:
        text: as it was given.
        metric: one of `METRICS`.
        above: whether it holds above the bound; else below.
        bound: of the number, or of its ratio to the dense model's.
        relative: whether it is that ratio.
    """

    text: str
    metric: str
    above: bool
    bound: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            ValueError: it is malformed, or can't mean anything.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or match[3].startswith("="):
            raise ValueError(
                f"'{text}' is not a condition; write perplexity>+50%, agreement<0.9 or kl>0.1"
            )
        metric, sign, number = match.groups()
        if metric not in METRICS:
            raise ValueError(f"unknown metric '{metric}'; {nearest(metric, METRICS)}")
        relative = number[0] in "+-"
        if relative:
            bound = _ratio(text, metric, number)
        elif number.endswith("%") and metric != "agreement":
            raise ValueError(f"in '{text}', write +{number} for {number} more than the dense model")
        else:
            bound = float(parse_number(number))
        if not relative and metric == "agreement" and not 0 <= bound <= 1:
            raise ValueError(f"in '{text}', agreement is a fraction, from 0 to 1")
        return cls(text, metric, sign == ">", bound, relative)

    def check(self, value: float) -> str | None:
        """Return what to say if the condition holds for a number, or for a ratio to dense."""
        if not (value > self.bound if self.above else value < self.bound):
            return None
        verb = "are" if self.metric in SIZES else "is"
        return f"{self.metric} {verb} {self._shown(value)}, which '{self.text}' rules out"

    def _shown(self, value: float) -> str:
        if self.relative:
            return f"{100 * (value - 1):+.1f} % against the dense model"
        return f"{value:,.0f}" if self.metric in SIZES else f"{value:.4g}"


def _ratio(text: str, metric: str, number: str) -> float:
    """The ratio to the dense model that ``+50%`` stands for."""
    match = _RELATIVE.fullmatch(number)
    if match is None:
        raise ValueError(f"in '{text}', '{number}' is not of the form +50%")
    if metric in ("agreement", "kl"):
        raise ValueError(f"in '{text}', {metric} compares with the dense model already")
    change = float(parse_number(f"{match[1]}%"))
    return 1 - change if number[0] == "-" else 1 + change


def parse_all(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Read conditions that have been checked with their recipe."""
    return tuple(Condition.parse(text) for text in texts)


def read_all(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Read conditions of the command line.

    Raises:
        RecipeError: one is malformed.
    """
    try:
        return parse_all(texts)
    except ValueError as error:
        raise RecipeError(str(error), where="--fail-if") from None


def ask_for(conditions: Sequence[Condition], metrics: Sequence[str]) -> bool:
    """Whether any of these numbers is needed."""
    return any(condition.metric in metrics for condition in conditions)


def check_evaluation(
    conditions: Sequence[Condition], models: Sequence[Measures], quality: Quality | None
) -> None:
    """See that no condition holds for the last of one or two models; see `check_conditions`."""
    check_conditions(conditions, models[0] if len(models) > 1 else None, models[-1], quality)


def check_conditions(
    conditions: Sequence[Condition],
    before: Measures | None,
    after: Measures,
    quality: Quality | None,
    metrics: Sequence[str] = METRICS,
) -> None:
    """See that no condition holds.

    Args:
        conditions: the conditions.
        before: of the dense model; None where there is none.
        after: of the slim model.
        quality: of both, where it was measured.
        metrics: what has been measured so far.

    Raises:
        ConditionError: one holds; its message has the value and the bound.
        EvaluationError: a number isn't known.
    """
    held = []
    for condition in conditions:
        if condition.metric in metrics:
            said = condition.check(_value(condition, before, after, quality))
            if said is not None:
                held.append(said)
    if held:
        raise ConditionError(
            held[0] if len(held) == 1 else "conditions of --fail-if hold",
            why="; ".join(held) if len(held) > 1 else None,
            hint="remove less, calibrate on text like your own, or allow more",
        )


def _value(
    condition: Condition, before: Measures | None, after: Measures, quality: Quality | None
) -> float:
    metric = condition.metric
    texts = () if quality is None else tuple(quality.texts.values())
    if metric == "agreement":
        found = min((t.agreement.value for t in texts if t.agreement), default=None)
    elif metric == "kl":
        found = max((t.kl.value for t in texts if t.kl), default=None)
    elif metric == "perplexity" and condition.relative:
        found = max((t.ratio.value for t in texts), default=None)
    elif metric == "perplexity":
        found = max((p.value for p in after.perplexities.values()), default=None)
    else:
        found = getattr(after, metric)
        if condition.relative and found is not None:
            dense = getattr(before, metric, None)
            found = found / dense if dense else None
    if found is None:
        raise EvaluationError(
            f"there is no {metric} to compare with '{condition.text}'", hint="leave it out"
        )
    return float(found)
