"""What observers are told of the difference to a dense model that runs along."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class GapObserver(Protocol):
    """An observer that also wants to know how far the run has strayed from the dense model."""

    def wants_gap(self, parameter: str, in_stream: bool) -> bool:
        """Whether `gap` is to be called for a weight: two products for each of its inputs.

        Args:
            parameter: the weight.
            in_stream: whether its product is added to a residual stream.
        """

    def gap(self, parameter: str, x: Tensor, missing: Tensor, stream: Tensor | None) -> None:
        """See what a weight's output lacks.

        Args:
            parameter: the weight.
            x: rows ``[tokens, features]`` that it reads in the treated model.
            missing: ``[tokens, out]``, to be added to its product with x: the difference to what
                the dense model has for the same tokens. Where the product is added to a residual
                stream, the gap of the sum; otherwise of the product.
            stream: ``[tokens, out]``, the sum in the dense model, where there is one.
        """


def tell_gap(
    observer: GapObserver,
    parameter: str,
    weight: Tensor,
    rows: tuple[Tensor, Tensor],
    beside: tuple[Tensor, Tensor] | None,
    valid: Tensor | None,
) -> None:
    """Tell an observer what the output of a dense weight lacks.

    Args:
        observer: who is told.
        parameter: the weight's name.
        weight: ``[out, in]``, dense.
        rows: ``[tokens, in]`` that it reads in the treated and in the dense model.
        beside: what its product is added to in each, ``[..., out]``; None if that is no stream.
        valid: the tokens of `beside` that count; None for all.
    """
    here, there = rows
    weight = weight.to(here.dtype)
    missing, stream = (there - here) @ weight.T, None
    if beside is not None:
        narrow, wide = (
            v.reshape(-1, missing.shape[1])[... if valid is None else valid] for v in beside
        )
        missing, stream = missing + (wide - narrow), there @ weight.T + wide
    observer.gap(parameter, here, missing, stream)
