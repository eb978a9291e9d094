"""Adapters: thin products B·A that are added to weights, in the form of one matrix.

The product is added to the weight itself, not to what the layer computes, so that a mask can be
laid over the sum: what is trained is exactly what is saved, on modules and on graphs alike. Where
there is no mask, a linear layer may compute the same sum without a gradient as large as its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def beside(self, x: Tensor, result: Tensor) -> Tensor:
        """A linear layer's result ``W x`` plus ``scale * B A x``.

        Args:
            x: ``[..., in]``.
            result: ``[..., out]``.
        """
        thin = nn.functional.linear(x, (self.a * self._seen())[0])
        flat = result.reshape(-1, result.shape[-1])
        b = self.scale * self.b[0]
        return torch.addmm(flat, thin.reshape(-1, len(self.a[0])), b.T).reshape(result.shape)

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


def compute_beside(layer: Any, adapter: Adapter) -> None:
    """Let a linear layer add to its result what an adapter adds to its weight.

    Only where that is the same: not while a mask or anything else lies over the sum, nor where the
    layout has the weight in another form than it is stored in.

    Args:
        layer: a linear layer with the adapter as a parametrization.
        adapter: of its weight.
    """
    if "forward" in vars(layer):
        return
    weight = layer.parametrizations.weight.original
    matrices = adapter.layout.matrices(weight)
    if matrices.shape != (1, *weight.shape) or matrices.stride()[1:] != weight.stride():
        return

    def forward(x: Tensor) -> Tensor:
        alone = len(layer.parametrizations.weight) == 1
        if not alone or adapter.removed is not None or adapter.watched:
            return nn.functional.linear(x, layer.weight, layer.bias)
        weight = layer.parametrizations.weight.original
        return adapter.beside(x, nn.functional.linear(x, weight, layer.bias))

    layer.forward = forward


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
