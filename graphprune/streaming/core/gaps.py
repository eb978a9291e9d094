"""What observers are told of the difference to a dense model that runs along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from graphprune.streaming.core.adapter import Sighting
from graphprune.streaming.core.observer import Observer


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


def tell_gaps(
    observers: Sequence[Observer],
    sightings: Sequence[Sighting],
    dense_weight: Callable[[str], Tensor],
    wide: Callable[[Tensor], Tensor],
    valid: Tensor | None,
) -> None:
    """Tell observers what the outputs of a group's weights lack that the dense model has.

    Args:
        observers: one per part of the group.
        sightings: of what the weights read, in the treated and in the dense model.
        dense_weight: gives a weight of the dense model by its name.
        wide: brings a value into the dtype of statistics.
        valid: the rows that count; None for all.
    """
    here, there = sightings
    layout = here.probe.site.layout
    x, wanted = (wide(one.value(one.probe.site.reads)) for one in sightings)
    for (parameter, other), (_, dense) in zip(here.probe.sums, there.probe.sums, strict=True):
        matrices = layout.matrices(dense_weight(parameter))
        pairs = zip(layout.rows(x, None, valid), layout.rows(wanted, None, valid), strict=True)
        for (part, rows), (_, dense_rows) in pairs:
            observer = observers[part]
            if not isinstance(observer, GapObserver) or not observer.wants_gap(
                parameter, other is not None
            ):
                continue
            beside = None
            if other is not None and dense is not None:
                beside = wide(here.value(other)), wide(there.value(dense))
            _tell(observer, parameter, matrices[part], (rows, dense_rows), beside, valid)


def _tell(
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
