"""What is left to learn of a text by someone who only knows how often each token occurs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETTER = 10
"""How much better than by chance a token is guessed that the sample doesn't have."""

SHARE = 1 / 3
"""How far from frequencies towards guessing a model may be: it brings those of other texts."""

SLACK = 0.05
"""Nats by which a trained model may miss a text that can't be told from guessing."""


def entropy(tokens: Tensor, vocabulary: int) -> float:
    """The loss (nats a token) of a model that has learnt the frequencies of tokens and no more.

    The frequencies of a sample alone would say too little: a short text has most of its tokens
    once, and looks as if they were few. By Good and Turing, those that it has once are as many as a
    text of the same kind would have that are new to it. A seen token x then has the probability
    ``covered * n(x) / n``, and the rest is for the others, each `BETTER` times as likely as if all
    of them were. That is the entropy of the sample where it covers all that there is, and a
    ``BETTER``-th of the vocabulary, as a perplexity, where it has every token once.

    To this comes what the sample may be below the entropy of where it is from: twice
    ``n * (entropy - sample's)`` is about chi-square with a degree of freedom for each token but
    one (Wilks), of which four standard deviations above the mean are taken.

    Args:
        tokens: integers, at least one.
        vocabulary: how many tokens there are.

    Returns:
        At most the logarithm of the vocabulary, which is what guessing costs.
    """
    counts = torch.bincount(tokens.flatten())
    counts = counts[counts > 0].double()
    total, kinds = float(counts.sum()), len(counts)
    shares = counts / total
    new = float((counts == 1).sum()) / total
    covered = 1 - new
    seen = -float((shares * shares.log()).sum())
    others = math.log(max(1.0, (vocabulary - kinds) / BETTER))
    split = -sum(p * math.log(p) for p in (covered, new) if p > 0)
    degrees = kinds - 1
    spread = (degrees + 4 * math.sqrt(2 * degrees)) / (2 * total)
    return min(split + covered * seen + new * others + spread, math.log(vocabulary))


def limit(tokens: Tensor, vocabulary: int) -> float:
    """The largest loss (nats a token) of a model that makes sense of a text.

    One that doesn't is about as far off as guessing, or further: its tokens are others than it was
    trained with. One that has learnt no more than frequencies makes little sense of it, but some.

    Args:
        tokens: of the text.
        vocabulary: how many tokens there are.
    """
    known = entropy(tokens, vocabulary)
    return known + SHARE * (math.log(vocabulary) - known) + SLACK
