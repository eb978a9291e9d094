"""The input that multiply-accumulates and latencies are of, the same wherever they are stated.

It is one sample: a batch of one where the model leaves the batch open, 128 tokens (or what the
model can take, if that is less) where it leaves their number open, and otherwise the sizes that the
model has fixed or was traced with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphprune.axes import Atom, Dims, Product, normal

LENGTH = 128
"""Tokens, and other open sizes of ONNX files."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Workload:
    """Sizes of one call of a model.

    Attributes:
        shapes: input name to its shape.
        tokens: whether all inputs are matrices of token ids, masks and the like.
    """

    shapes: Shapes
    tokens: bool = False

    def __str__(self) -> str:
        """Name the sizes: "1 x 128 tokens", "1 x 3 x 224 x 224"; what is several inputs by name."""
        sizes = {" x ".join(map(str, shape)): name for name, shape in self.shapes.items()}
        if len(sizes) == 1:
            return f"{next(iter(sizes))} tokens" if self.tokens else next(iter(sizes))
        named = (f"{name} {' x '.join(map(str, s))}" for name, s in self.shapes.items())
        return ", ".join(named)


def resized(
    values: Mapping[str, Sequence[Dims]], shapes: Mapping[str, Sequence[Sequence[int]]]
) -> Iterator[tuple[Atom, int]]:
    """Axes and the sizes that they have, where these are others."""
    found: dict[Atom, int] = {}
    merged = []
    for name, several in values.items():
        for dims, shape in zip(several, shapes.get(name, ()), strict=False):
            for d, size in zip(dims, shape, strict=False):
                e = normal(d)
                if isinstance(e, Atom) and e.size != size:
                    found[e] = size
                elif isinstance(e, Product) and e.size != size:
                    merged.append((e, size))
    for e, size in merged:  # an open size that stands nowhere alone
        left = [a for a in e.factors if isinstance(a, Atom) and a not in found and a.frozen]
        rest = math.prod(found.get(f, f.size) if isinstance(f, Atom) else f.size for f in e.factors)
        if len(left) == 1 and rest != size:
            found[left[0]] = size * left[0].size // rest
    yield from found.items()
