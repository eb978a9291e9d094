"""What sees the activations of a streamed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.precision import finite
from graphprune.streaming.core.adapter import Sighting


class Observer(Protocol):
    """Something that accumulates a statistic of activations. See also `Checking`."""

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""


@runtime_checkable
class Checking(Protocol):
    """An observer that looks for itself whether rows are finite: nobody else has to read them.

    Attributes:
        checks: True; `add` then raises `CalibrationError` for rows that are not finite.
    """

    checks: ClassVar[bool]

    def add(self, x: Tensor) -> None:
        """See rows ``[tokens, features]`` in the dtype of the run. Never called without tokens."""


@runtime_checkable
class Additive(Protocol):
    """An observer whose statistic is a sum over rows, so that processes can share the samples."""

    def totals(self) -> dict[str, Tensor]:
        """What it has summed up so far, by name; nothing before the first rows.

        Names and shapes don't depend on the rows. In float64 the result doesn't depend on how many
        processes there are.
        """

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from the sums of all processes."""


@runtime_checkable
class Numbered(Protocol):
    """An observer that wants to know which batch rows are of."""

    def begin(self, batch: int) -> None:
        """What comes next is of the batch of this number, among those of all processes."""


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


def show(observer: Observer, rows: Tensor) -> bool:
    """Show rows to an observer, if they are finite, and say whether they are.

    Raises:
        CalibrationError: the observer has another reason to refuse them.
    """
    if not (isinstance(observer, Checking) and observer.checks):
        if not finite(rows):
            return False
        observer.add(rows)
        return True
    try:
        observer.add(rows)
    except CalibrationError:
        if finite(rows):
            raise
        return False
    return True


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
    weight = weight.to(here)
    missing, stream = (there - here) @ weight.T, None
    if beside is not None:
        narrow, wide = (
            v.reshape(-1, missing.shape[1])[... if valid is None else valid] for v in beside
        )
        missing, stream = missing + (wide - narrow), there @ weight.T + wide
    observer.gap(parameter, here, missing, stream)
