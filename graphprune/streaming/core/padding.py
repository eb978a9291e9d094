"""Which rows of an activation are padding, read off the axes of the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.axes import Expr, Product, normal
from graphprune.errors import PlanError
from graphprune.streaming.core.layout import Experts, Matrix
from graphprune.streaming.core.sites import Site


class Padding:
    """Finds the valid rows of values, whatever reshapes led to them.

    A row of an activation belongs to a token if its axes hold the two axes of the token ids.
    """

    def __init__(self, program: BaseProgram) -> None:
        """The padding of a program's inputs."""
        self._values = program.typing.values
        self._inputs = {
            leaf
            for name in program.inputs
            for dims in self._values.get(name, ())
            for d in dims
            for leaf in _factors(d)
        }

    def rows(self, site: Site, x: Tensor, valid: Mapping[str, Tensor]) -> Tensor | None:
        """Which rows of the value of a site are no padding.

        Args:
            site: where the weight is applied.
            x: its value.
            valid: name of an input of token ids to bool ``[batch, length]``.

        Returns:
            bool ``[rows]`` in the order of the layout's rows, or None if all rows are valid.

        Raises:
            PlanError: there is padding, and it can't be told from the rest.
        """
        found: Tensor | None = None
        for name, mask in valid.items():
            if bool(mask.all()):
                continue
            own = self._rows_of(site, x, name, mask)
            if own is not None:
                found = own if found is None else found & own
        return found

    def _rows_of(self, site: Site, x: Tensor, name: str, mask: Tensor) -> Tensor | None:
        # Of a masked model's own values the axes aren't known, but they are those of the operand.
        read = site.reads if site.reads in self._values else site.operand
        dims = list(self._values.get(read, ((),))[0])
        if len(dims) != x.dim() or not isinstance(site.layout, Matrix | Experts):
            raise _unclear(site, "its rows are no tokens")
        features = getattr(site.layout, "features", -1)
        dims.pop(features)
        factors = [f for d in dims for f in _factors(d)]
        tokens = [_factors(d) for d in self._values[name][0]]
        if not set(tokens[1]) & set(factors):
            if self._inputs.issuperset(factors):
                return None  # it doesn't vary over these tokens
            raise _unclear(site, "its rows aren't known to be tokens")
        sizes = [f.size for f in factors]
        for own, size in zip(tokens, mask.shape, strict=True):
            if own and factors.count(own[0]) != 1:
                raise _unclear(site, "its rows are no tokens, or pairs of them")
            if own:
                sizes[factors.index(own[0])] = size
        if math.prod(sizes) != x.numel() // max(x.shape[features], 1):
            raise _unclear(site, "its rows are no multiple of the tokens")
        order = sorted((d for d in (0, 1) if tokens[d]), key=lambda d: factors.index(tokens[d][0]))
        kept = {tokens[d][0] for d in order}
        view = [s if f in kept else 1 for f, s in zip(factors, sizes, strict=True)]
        shaped = mask.permute(order + [d for d in (0, 1) if d not in order])
        return shaped.reshape(view).expand(sizes).flatten().to(device=x.device, dtype=torch.bool)


def _factors(e: Expr) -> tuple[Expr, ...]:
    """The axes that an axis merges, from the outside in; none for size 1."""
    e = normal(e)
    return e.factors if isinstance(e, Product) else (e,)


def _unclear(site: Site, why: str) -> PlanError:
    return PlanError(
        "padding can't be told from tokens",
        where=f"{site.reads}, read by {site.parameter}",
        why=why,
        hint="give samples without padding: windows of one length, or one sample per batch",
    )
