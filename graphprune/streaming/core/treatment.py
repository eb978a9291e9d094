"""What is done to the weights of a streamed run, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from graphprune.streaming.core.observer import Observer
from graphprune.streaming.core.sites import Group


@runtime_checkable
class Recording(Protocol):
    """A treatment whose decisions outlive an interruption."""

    def record(self, group: Group) -> Any:
        """What was decided for a group, as JSON data."""

    def recall(self, group: Group, record: Any) -> None:
        """Take up a decision of an interrupted run."""


@runtime_checkable
class Separable(Protocol):
    """A treatment that solves every part of every weight by itself: processes share the work."""

    def observer(self, group: Group, part: int) -> Observer:
        """See `Treatment.observer`."""

    def solve(self, group: Group, name: str, part: int, matrix: Tensor, observer: Observer) -> Any:
        """Solve one part of a weight.

        Args:
            group: see `Treatment.treat`.
            name: the parameter.
            part: number of the matrix in it.
            matrix: ``[out, in]``.
            observer: of the part.

        Returns:
            What can be pickled; tensors in it are sent as they are.
        """

    def assemble(self, group: Group, name: str, weight: Tensor, solved: Sequence[Any]) -> Tensor:
        """The new weight from what `solve` has given for its parts, in order."""


class Treatment(Protocol):
    """What is done to the weights. See also `Recording` and `Separable`.

    Where processes share the samples, one of them asks a `Recording` treatment to `treat` a group,
    and the others are told what came out. Any other treatment is asked by every process, with the
    statistics of all samples, and has to do the same on each.
    """

    def observer(self, group: Group, part: int) -> Observer:
        """A new observer for one part of a group: a layer, an expert or a group of channels."""

    def treat(
        self, group: Group, observers: Sequence[Observer], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Change the weights of a group.

        Args:
            group: the group; `Group.layout` says how a weight is a stack of matrices ``[out, in]``.
            observers: one per part, which have seen all samples. One that has seen no token has
                never been called.
            weights: parameter name to tensor, as stored; each is read when it is asked for. It has
                the biases of these weights, too (`graphprune.streaming.find_biases`).

        Returns:
            (parameter, new weight of the same shape) pairs, each of which is taken before the next
            one is asked for; weights that don't appear stay as they are.
        """


@dataclass(frozen=True, slots=True)
class Step:
    """What a progress callback is told when a group has been treated.

    Attributes:
        group: the group.
        total: number of groups.
        tokens: rows that each part's observer has seen; 0 for an expert that no token chose.
        held: names of the values that wait for the next partition, for every sample.
        held_bytes: their memory, all samples together.
        restored: whether the weights came from an interrupted run.
    """

    group: Group
    total: int
    tokens: tuple[int, ...]
    held: frozenset[str]
    held_bytes: int
    restored: bool = False
