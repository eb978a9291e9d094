"""What `graphprune eval` measures models on that are on disk, and what its conditions need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.calibration.text.read import BUILTIN, HELP, read_text, windows
from graphprune.calibration.text.tokenising import tokenised
from graphprune.calibration.tokens import tokenizer_of
from graphprune.errors import EvaluationError, LoadError, RecipeError
from graphprune.ir.torch.program import Program
from graphprune.quality.conditions import QUALITY, Condition

ENOUGH = 64
"""Windows of each of our own texts, where nobody says how many; of others all are taken."""

_COMPARED = 10_000
"""Characters by which tokenizers are compared."""


def shared_windows(
    programs: Mapping[str, Program], texts: Sequence[str], length: int, count: int | None
) -> dict[str, Tensor]:
    """Windows for all models, by text.

    Args:
        programs: by their sources.
        texts: where to take text from; none of them for our own two, if that suits a model.
        length: tokens in a window.
        count: of the windows of each text; None for all of a given text and `ENOUGH` of our own.

    Returns:
        int64 ``[count, length]`` each; nothing where no text suits.

    Raises:
        LoadError: a text can't be read or is too short, or no model has a tokenizer.
        EvaluationError: two models have different tokenizers.
    """
    if not programs or not (texts or any(p.is_causal for p in programs.values())):
        return {}
    found = {source: tokenizer_of(program) for source, program in programs.items()}
    tokenizers = {source: one for source, one in found.items() if one is not None}
    if not tokenizers:
        if not texts:
            return {}
        raise LoadError("text needs a tokenizer, and the model has none")
    tokenizer = next(iter(tokenizers.values()))
    contents = {text: read_text(text) for text in texts or (BUILTIN, HELP)}
    for content in contents.values():
        _check_same(tokenizers, content[:_COMPARED])
    if texts:
        return {
            text: windows(tokenizer, content, length=length, count=count)
            for text, content in contents.items()
        }
    # Drawn, since a text of several kinds has them one after the other.
    return {
        text: windows(tokenizer, content, length=length, count=count, seed=0)[: count or ENOUGH]
        for text, content in contents.items()
    }


def check_askable(conditions: Sequence[Condition], sources: Sequence[str]) -> None:
    """See that conditions can be evaluated, before a model is loaded.

    Args:
        conditions: on the last of the sources.
        sources: it, and before it the one to compare it with, if there is one.

    Raises:
        RecipeError: one can't.
    """
    for condition in conditions:
        compares = condition.relative or condition.metric in ("agreement", "kl")
        if compares and len(sources) < 2:
            raise RecipeError(
                f"'{condition.text}' compares with another model",
                where="--fail-if",
                hint="name the dense model with --against",
            )
        if condition.metric in QUALITY:
            compared = sources if compares else sources[-1:]
            for source in compared:
                if source.endswith(".onnx"):
                    raise _unmeasurable(condition, source, "of ONNX files no text is measured")


def check_loaded(
    conditions: Sequence[Condition], programs: Mapping[str, Program], texts: Mapping[str, Tensor]
) -> None:
    """See that conditions can be evaluated of models that have been loaded.

    Raises:
        RecipeError: one can't.
    """
    for condition in conditions:
        for source, program in programs.items():
            if condition.metric in QUALITY and not program.is_causal:
                raise _unmeasurable(condition, source, "it is not a causal language model")
            if condition.metric in QUALITY and not texts:
                raise _unmeasurable(condition, source, "there is no tokenizer")


def _unmeasurable(condition: Condition, source: str, why: str) -> RecipeError:
    return RecipeError(
        f"{condition.metric} can't be measured",
        where=f"--fail-if '{condition.text}', {source}",
        why=why,
        hint="give conditions on parameters, macs or bytes only",
    )


def _check_same(tokenizers: Mapping[str, object], text: str) -> None:
    """Tokens are counted, and compared, one by one: both models have to read the same ones."""
    (first, one), *others = tokenizers.items()
    expected = tokenised(one, text)
    for source, other in others:
        if not torch.equal(tokenised(other, text), expected):
            raise EvaluationError(
                "the models read the text in different tokens",
                where=f"{first}, {source}",
                why="their tokenizers differ, and perplexities are by token",
                hint="evaluate each without --against",
            )
