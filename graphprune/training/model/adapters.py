"""Adapters: thin products B·A that are added to weights, in the form of one matrix.

The product is added to the weight itself, not to what the layer computes, so that a mask can be
laid over the sum: what is trained is exactly what is saved, on modules and on graphs alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.streaming.core.layout import Layout
from graphprune.training.core.order import generator


@dataclass
class Draw:
    """What the random numbers of a forward pass depend on; None draws none."""

    key: tuple[int, ...] | None = None


class Adapter(nn.Module):
    """A parametrization: the weight plus ``scale * B·A``, zeros where a mask has them.

    Attributes:
        a: ``[parts, rank, in]``, random.
        b: ``[parts, out, rank]``, zeros at first.
        watched: whether the gradients of the effective weight are added up.
        gradient: their sum since somebody took it, of the weight's shape; None for none.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        layout: Layout,
        rank: int,
        alpha: float,
        removed: Tensor | None,
        dropout: float,
        draw: Draw,
        seed: int,
    ) -> None:
        super().__init__()
        parts, out, width = layout.matrices(weight).shape
        thin = min(rank, out, width)
        bound = width**-0.5
        a = torch.empty(parts, thin, width, dtype=weight.dtype)
        a.uniform_(-bound, bound, generator=generator("adapter", seed, name))
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(weight.new_zeros(parts, out, thin))
        self.scale = alpha / thin
        self.name, self.layout, self.dropout, self.draw = name, layout, dropout, draw
        self.removed: Tensor | None
        placed = None if removed is None else removed.to(weight.device)
        self.register_buffer("removed", placed, persistent=False)
        self.watched = False
        self.gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in its own dtype: products around it may be in another."""
        with torch.autocast(weight.device.type, enabled=False):
            found = self.effective(weight, self.a * self._seen(), self.b, self.removed)
        if self.watched and found.requires_grad:
            found.register_hook(self._add)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def remove(self, removed: Tensor) -> Tensor:
        """Hold more zeros from now on; all that are held."""
        placed = removed.to(self.a.device)
        self.removed = placed if self.removed is None else self.removed | placed
        return self.removed

    def effective(self, weight: Tensor, a: Tensor, b: Tensor, removed: Tensor | None) -> Tensor:
        """``mask(W + scale * B·A)``."""
        change = self.layout.restored(self.scale * (b @ a), weight.shape)
        sum_ = weight + change.to(weight.dtype)
        return sum_ if removed is None else sum_.masked_fill(removed, 0.0)

    def _add(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def _seen(self) -> Tensor | float:
        """Which inputs the adapter sees in this pass, for all tokens alike."""
        if not self.dropout or self.draw.key is None:
            return 1.0
        parts, _, width = self.a.shape
        numbers = torch.rand(parts, 1, width, generator=generator(self.name, *self.draw.key))
        kept = (numbers >= self.dropout).to(self.a.dtype)
        return (kept / (1 - self.dropout)).to(self.a.device)


@dataclass(frozen=True)
class Flat:
    """The layout of a weight of which no graph tells how it is used: rows times everything else."""

    @property
    def parts(self) -> int:
        """Number of matrices in the weight."""
        return 1

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[1, out, in]``."""
        return weight.flatten(1).unsqueeze(0)

    def restored(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`."""
        return matrices.reshape(shape)
