"""Two models on the same windows: perplexities, top-1 agreement and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphprune.quality.intervals import mean_estimate, ratio_estimate
from graphprune.quality.perplexity import (
    Perplexity,
    batches,
    check_causal,
    logits_of,
    perplexity_of,
    window_losses,
)
from graphprune.quality.result import Comparison


@dataclass(frozen=True)
class Pair:
    """What two models made of the same windows."""

    dense: Perplexity
    slim: Perplexity
    comparison: Comparison


def compare(dense: Callable[..., Any], slim: Callable[..., Any], windows: Tensor) -> Pair:
    """Measure two causal language models on the same windows.

    Args:
        dense: called with ``input_ids=[batch, length]``; see
            `graphprune.quality.perplexity.perplexity`.
        slim: called in the same way.
        windows: int64 ``[count, length]``, of two tokens or more. The first of each is context
            only, here as in agreement and divergence.

    Raises:
        NoPerplexityError: one is no causal language model.
        EvaluationError: the tokens are not of a vocabulary, or a logit is NaN.
    """
    return compare_all(dense, [slim], windows)[0]


def compare_all(
    dense: Callable[..., Any], slims: Sequence[Callable[..., Any]], windows: Tensor
) -> list[Pair]:
    """Measure several models beside one, which runs once.

    Args:
        dense: see `compare`.
        slims: the others.
        windows: see `compare`.

    Returns:
        What `compare` returns, for each of the others.

    Raises:
        NoPerplexityError, EvaluationError: see `compare`.
    """
    losses: list[float] = []
    read = [_Read() for _ in slims]
    with torch.inference_mode():
        size = check_causal(dense, windows)
        sizes = [check_causal(model, windows) for model in slims]
        for batch in batches(windows, max(size, *sizes)):
            before = logits_of(dense, batch)
            losses.extend(window_losses(before, batch))
            wanted = [_Wanted.of(one) for one in before[:, :-1]] if size in sizes else []
            for model, own, found in zip(slims, sizes, read, strict=True):
                found.add(logits_of(model, batch), batch, wanted if own == size else [])
    first = perplexity_of(losses, windows, size)
    return [found.pair(first, windows, own) for own, found in zip(sizes, read, strict=True)]


@dataclass(frozen=True)
class _Wanted:
    """What the dense model says of a window.

    Attributes:
        top: [tokens], the most likely token.
        logs: [tokens, vocabulary], logarithms of the probabilities.
    """

    top: Tensor
    logs: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Wanted:
        """Of logits ``[tokens, vocabulary]``."""
        return cls(logits.argmax(-1), logits.float().log_softmax(-1))


@dataclass
class _Read:
    """What one model made of windows, beside the dense one."""

    losses: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, batch: Tensor, wanted: Sequence[_Wanted]) -> None:
        """Count the logits of a batch.

        Args:
            logits: of this model.
            batch: the windows.
            wanted: what the dense model says of each; nothing for one of another vocabulary.
        """
        self.losses.extend(window_losses(logits, batch))
        for one, own in zip(wanted, logits[:, :-1], strict=bool(wanted)):
            self.agreements.append(float((one.top == own.argmax(-1)).double().mean()))
            self.divergences.append(_divergence(one.logs, own.float()))

    def pair(self, dense: Perplexity, windows: Tensor, size: int) -> Pair:
        """Both models' results."""
        slim = perplexity_of(self.losses, windows, size)
        count, length = windows.shape
        finite = all(map(math.isfinite, self.divergences))
        found = Comparison(
            windows=count,
            length=length,
            tokens=count * (length - 1),
            ratio=ratio_estimate(dense.losses, slim.losses),
            agreement=mean_estimate(self.agreements, 0, 1) if self.agreements else None,
            kl=mean_estimate(self.divergences, 0, math.inf)
            if self.divergences and finite
            else None,
        )
        return Pair(dense, slim, found)


def _divergence(p: Tensor, slim: Tensor) -> float:
    """Mean KL(dense || slim) of log-probabilities and logits ``[tokens, vocabulary]``."""
    q = slim.log_softmax(-1)
    # What the dense model excludes (logits of -inf) adds nothing.
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return float(terms.sum(-1).double().mean())
