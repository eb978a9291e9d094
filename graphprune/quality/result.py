"""What is measured of a slim language model beside its dense one, as the report has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A mean over windows of text.

    Attributes:
        value: the estimate.
        low: where its 95 % interval begins; None for a single window, which has none.
        high: where it ends.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows of one text.

    Attributes:
        windows: how many.
        length: tokens in each; the first of them is context only.
        tokens: how many are predicted.
        ratio: the slim model's perplexity divided by the dense model's.
        agreement: fraction of the tokens for which both find the same one most likely; None for
            models of different vocabularies.
        kl: mean KL(dense || slim) of the distributions of a token, in nats; likewise.
    """

    windows: int
    length: int
    tokens: int
    ratio: Estimate
    agreement: Estimate | None = None
    kl: Estimate | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt, continued with the most likely tokens.

    Attributes:
        prompt: what the model is asked to continue.
        dense: what the dense model adds.
        slim: what the slim model adds; None where there is one model.
    """

    prompt: str
    dense: str
    slim: str | None = None


@dataclass(frozen=True)
class Quality:
    """How near a slim language model is to its dense one.

    Attributes:
        texts: by the text that they were compared on.
        completions: for everyone to read.
    """

    texts: Mapping[str, Comparison] = field(default_factory=dict)
    completions: tuple[Completion, ...] = ()
