"""What the loop of a streamed run asks of a graph format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.placement import Placement
from graphprune.placement.waiting import Held, Waiting
from graphprune.plan.plan import Selection
from graphprune.streaming.core.cache import ActivationCache
from graphprune.streaming.core.schedule import Probe, Schedule
from graphprune.streaming.core.sites import Globs, Site, Sites
from graphprune.streaming.core.weights import TreatedWeights


@dataclass(frozen=True)
class Options:
    """How samples go through a graph; see `graphprune.streaming.stream`."""

    dtype: torch.dtype
    reference: bool
    selection: Selection | None
    waiting: Waiting

    @property
    def placement(self) -> Placement:
        """Where it is computed."""
        return self.waiting.placement

    @property
    def held(self) -> Held:
        """How activations wait."""
        return self.waiting.how

    def settings(self) -> dict[str, str]:
        """What a run that goes on after an interruption must have in common."""
        return {
            "dtype": str(self.dtype),
            "held": str(self.held.dtype),
            "reference": str(self.reference),
            "masked": str(self.selection is not None),
        }


@dataclass(frozen=True, slots=True)
class Sighting:
    """Values that a probe sees in one model, until the model goes on.

    Attributes:
        place: where in the graph.
        probe: what looks.
        value: gives a value of `Probe.seen` by its name.
    """

    place: int
    probe: Probe
    value: Callable[[str], Any]


class StreamedModel(ABC):
    """One model on the way of all batches through its graph.

    Attributes:
        schedule: when everything happens.
        cache: the activations that wait for the next partition.
    """

    schedule: Schedule
    cache: ActivationCache

    @abstractmethod
    def forward(self, group: int, batch: int) -> Iterator[Sighting]:
        """Run a batch from the barrier before a group's to its own, and cache what lives on.

        It is run as far as the next probe whenever a sighting is asked for.

        Raises:
            PlanError: an operator refuses its operands, or nothing can run it.
        """

    @abstractmethod
    def forget(self) -> None:
        """Let go of weights, which are about to change."""

    @abstractmethod
    def stored(self, name: str) -> Tensor:
        """A weight of the model as it is stored."""

    @abstractmethod
    def not_finite(self, site: Site, batch: int, place: int) -> PlanError:
        """The error for an activation with NaN or infinity: it finds the operator that made it.

        Args:
            site: what reads the activation.
            batch: where it occurs.
            place: of the probe that saw it.
        """

    def held(self, group: int) -> frozenset[str]:
        """Names of the values that live across a group's barrier."""
        return self.schedule.held(self.schedule.barriers[group])

    def saved(self) -> list[Mapping[str, Any]]:
        """What has to be saved of the cache to go on from here."""
        return list(self.cache.entries())

    def restore(self, group: int, saved: Iterator[Mapping[str, Any]]) -> None:
        """Fill the cache with what was `saved` at a group's barrier: as many items as that gave."""
        del group
        self.cache.fill(saved)


class GraphAdapter(Protocol):
    """A program of one graph format, as streamed runs know it."""

    def find_sites(self, include: Globs | None, exclude: Globs, *, every: bool) -> Sites:
        """See `graphprune.streaming.find_sites`."""

    def find_biases(self, sites: Iterable[Site]) -> dict[str, str]:
        """See `graphprune.streaming.find_biases`."""

    def summands(self, sites: Iterable[Site]) -> Mapping[str, Any]:
        """Names of the products that are added to a value that is computed before them."""

    def with_weights(self, new: Mapping[str, Tensor]) -> Any:
        """See `graphprune.streaming.apply_weights`."""

    def models(
        self, sites: Sites, batches: Sequence[Batch], treated: TreatedWeights, options: Options
    ) -> Sequence[StreamedModel]:
        """The model with the weights of `treated`, and the dense one if it runs along.

        Raises:
            PlanError: the program has no weights, or the batches don't fit it.
        """
