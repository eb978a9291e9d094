"""How blocks are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphprune.errors import RecipeError


@dataclass(frozen=True)
class Match:
    """How each block is trained on what the dense block computes.

    Attributes:
        lr: Adam's rate of learning, at the start; it falls to zero along a cosine.
        epochs: how often each window is seen.
        held_out: share of the windows that judge, and train nothing.
        weigh: "token" divides the error of each token by the size of its residual stream: a few
            streams are hundreds of times as large as the rest. "none" takes errors as they are.
        held: type in which activations wait for the next block, "float32" or "bfloat16".
        seed: of the order of the windows.
    """

    lr: float = 8e-4
    epochs: int = 3
    held_out: float = 0.125
    weigh: Literal["token", "none"] = "token"
    held: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.lr < 1:
            raise RecipeError("match takes an lr from 0 to below 1", why=f"it is {self.lr:g}")
        if self.epochs < 0:
            raise RecipeError("match takes 0 epochs or more", why=f"they are {self.epochs}")
        if not 0 < self.held_out < 1:
            raise RecipeError(
                "match holds out more than no window and fewer than all",
                why=f"held_out is {self.held_out:g}",
            )
        if self.weigh not in ("token", "none"):
            raise RecipeError("match weighs by token or none", why=f"weigh is {self.weigh!r}")
        if self.held not in ("float32", "bfloat16"):
            raise RecipeError("match holds float32 or bfloat16", why=f"held is {self.held!r}")

    def judges(self, count: int) -> frozenset[int]:
        """Numbers of the samples that judge, spread evenly over all `count` of them."""
        judging = min(max(round(count * self.held_out), 1), count - 1)
        return frozenset((2 * i + 1) * count // (2 * judging) for i in range(judging))
