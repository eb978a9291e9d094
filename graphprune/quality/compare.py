"""Two models on the same windows: perplexities, top-1 agreement and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
    losses: tuple[list[float], list[float]] = ([], [])
    agreements: list[float] = []
    divergences: list[float] = []
    with torch.inference_mode():
        sizes = [check_causal(model, windows) for model in (dense, slim)]
        for batch in batches(windows, max(sizes)):
            before, after = logits_of(dense, batch), logits_of(slim, batch)
            losses[0].extend(window_losses(before, batch))
            losses[1].extend(window_losses(after, batch))
            if sizes[0] == sizes[1]:
                for one, other in zip(before[:, :-1], after[:, :-1], strict=True):
                    same = one.argmax(-1) == other.argmax(-1)
                    agreements.append(float(same.double().mean()))
                    divergences.append(_divergence(one.float(), other.float()))
    first, second = (
        perplexity_of(found, windows, size) for found, size in zip(losses, sizes, strict=True)
    )
    count, length = windows.shape
    finite = all(map(math.isfinite, divergences))
    found = Comparison(
        windows=count,
        length=length,
        tokens=count * (length - 1),
        ratio=ratio_estimate(first.losses, second.losses),
        agreement=mean_estimate(agreements, 0, 1) if agreements else None,
        kl=mean_estimate(divergences, 0, math.inf) if divergences and finite else None,
    )
    return Pair(first, second, found)


def _divergence(dense: Tensor, slim: Tensor) -> float:
    """Mean KL(dense || slim) of logits ``[tokens, vocabulary]``."""
    p, q = dense.log_softmax(-1), slim.log_softmax(-1)
    # What the dense model excludes (logits of -inf) adds nothing.
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return float(terms.sum(-1).double().mean())
