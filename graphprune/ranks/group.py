"""What processes that share a run do together.

Every process has to call the same methods in the same order, whatever its own samples hold: one
that left a call out, because none of its tokens chose some expert, would leave the others waiting.
A world of one calls the same methods, which then have nothing to do. What a method is given to make
is made by each process for itself: it can't speak with the others from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.ranks.dealing import deal
from graphprune.ranks.messages import Envelope, pack, raw, unpack

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        group: the group of `torch.distributed` that they speak in; None for that of all.
        direct: types of devices whose tensors are sent from where they lie; others by way of
            memory.
        apart: whether there are others, with which nothing is shared at the moment.
    """

    rank: int = 0
    world: int = 1
    group: Any = None
    direct: frozenset[str] = frozenset({"cpu"})
    apart: bool = False

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """The numbers of the items that are this process's, ascending; there may be none."""
        return [i for i, hand in enumerate(deal(costs, self.world)) if hand == self.rank]

    def agree(self, make: Callable[[], T]) -> list[T]:
        """What every process makes, in their order; what one refuses, all refuse.

        Args:
            make: gives something small that can be pickled.

        Raises:
            GraphPruneError: that of the first process that has one.
        """
        if self.world == 1:
            return [make()]
        own, failure = _tried(make)
        found: list[Any] = [None] * self.world
        self._speak(lambda: dist.all_gather_object(found, (own, failure), group=self.group))
        for rank, (_, other) in enumerate(found):
            if other is not None:
                raise shared(failure if failure is not None and rank == self.rank else other)
        return [own for own, _ in found]

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them; the others don't make it.

        Raises:
            GraphPruneError: the first process refuses.
        """
        (found,) = self.relay(0, lambda: (make(),))
        return found

    def relay(self, owner: int, make: Callable[[], Iterable[T]]) -> Iterator[T]:
        """What one process makes, piece by piece, on all of them.

        Args:
            owner: the process that makes it.
            make: called there only.

        Raises:
            GraphPruneError: the owner refuses.
        """
        if self.world == 1:
            yield from make()
            return
        if self.rank != owner:
            while (piece := self._receive(owner))[0] == "piece":
                yield piece[1]
            if piece[0] == "failure":
                raise shared(piece[1])
            return
        pieces: Iterator[T] | None = None

        def begin_or_go_on() -> T:
            nonlocal pieces
            pieces = iter(make()) if pieces is None else pieces
            return next(pieces, _END)

        while True:
            found, failure = _tried(begin_or_go_on)
            if failure is not None:
                self._send(("failure", failure))
                raise shared(failure)
            if found is _END:
                break
            self._send(("piece", found))
            yield found
        self._send(("end", None))

    def broadcast(self, owner: int, value: Any) -> Any:
        """The owner's value, on all processes; the others' doesn't count."""
        if self.world == 1:
            return value
        if self.rank != owner:
            return self._receive(owner)
        self._send(value)
        return value

    def add(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """The sum of all processes' tensors, which have one shape and type.

        Args:
            tensor: it may be overwritten.
            owner: the only process that needs the sum; None where all do.

        Returns:
            The sum, on the device of `tensor`; anything where this isn't the owner.
        """
        if self.world == 1:
            return tensor
        carried = self._carried(tensor).contiguous()

        def send() -> None:
            if owner is None:
                dist.all_reduce(carried, group=self.group)
            else:
                dist.reduce(carried, self._named(owner), group=self.group)

        self._speak(send)
        return carried.to(tensor.device)

    def _send(self, value: Any) -> None:
        """Send a value of this process to all others."""
        if self.world == 1:
            return
        envelope, tensors = pack(value)
        self._speak(
            lambda: dist.broadcast_object_list([envelope], self._named(self.rank), group=self.group)
        )
        for piece in raw([self._carried(t) for t in tensors]):
            self._pass(piece, self.rank)

    def _receive(self, owner: int) -> Any:
        found: list[Any] = [None]
        self._speak(lambda: dist.broadcast_object_list(found, self._named(owner), group=self.group))
        envelope: Envelope = found[0]
        tensors = []
        for blank in envelope.blanks:
            own = blank.empty()
            carried = self._carried(own)
            for piece in raw([carried]):
                self._pass(piece, owner)
            tensors.append(carried.to(own.device))
        return unpack(envelope, tensors)

    def _pass(self, piece: Tensor, owner: int) -> None:
        self._speak(lambda: dist.broadcast(piece, self._named(owner), group=self.group))

    def _carried(self, tensor: Tensor) -> Tensor:
        """A tensor where the backend speaks of it."""
        return tensor if tensor.device.type in self.direct else tensor.cpu()

    def _named(self, rank: int) -> int:
        """A process by its number in the world that torch knows."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _speak(self, send: Callable[[], object]) -> None:
        """Send or receive.

        Raises:
            RanksError: another process is gone.
        """
        try:
            send()
        except RuntimeError as error:
            raise RanksError(
                "another process of this run has ended",
                where=f"process {self.rank} of {self.world}",
                why=" ".join(str(error).split()).partition(" This is typically")[0][:200],
                hint="see what it said; what is saved can be gone on from with --resume",
            ) from error


class RanksError(GraphPruneError):
    """Processes can't share a run, or one of them is gone."""


_ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("ranks", default=_ALONE)


def current() -> Ranks:
    """This process among those that share the present run; a world of its own by default."""
    return _current.get()


def shared(error: GraphPruneError) -> GraphPruneError:
    """The same error, which every process raises: the first one will tell of it."""
    error.__dict__["shared"] = True
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every process raises this error."""
    return bool(getattr(error, "shared", False))


_END: Any = object()


def _tried(make: Callable[[], T]) -> tuple[Any, GraphPruneError | None]:
    """What is made apart from the others, or why it is refused."""
    before = _current.set(Ranks(apart=True))
    try:
        return make(), None
    except GraphPruneError as error:
        return None, error
    finally:
        _current.reset(before)
