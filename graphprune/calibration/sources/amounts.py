"""How much data is used where a recipe doesn't say; known without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.checkpoints.config import WINDOW


@dataclass(frozen=True)
class Amount:
    """How much data is used where a recipe doesn't say.

    Attributes:
        count: of samples, or all if there are fewer.
        length: of token windows; None for `BaseProgram.default_window`.
    """

    count: int
    length: int | None

    @property
    def tokens(self) -> int:
        """In a window of a model that takes any number."""
        return self.length or WINDOW


SCORES = Amount(16, 128)
"""For gradients: enough to rank units, and cheap."""

WEIGHTS = Amount(128, None)
"""For what changes weights: what the papers calibrate on."""

REPAIRS = Amount(128, 512)
"""For choosing with refits, and for repairs."""

TRAINING = Amount(320, 512)
"""For training: enough for a mask or a narrower model to recover most of what it can on a CPU."""

MEASURED = Amount(32, 256)
"""Of each text that a language model is measured on.

How wide the interval of a ratio is depends on the number of tokens. On SmolLM2-135M less a tenth of
every ffn at random (2.1 times the dense perplexity), 16 windows of 128 tokens tell it within 11 %,
these within 5 %. Two texts take both models 33,000 tokens, a quarter of what weights are fitted to.
"""

GENERAL = 0.55
"""Share of the windows that are general text where the data is a text of the user's."""
