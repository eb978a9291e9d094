"""The activation cache: how values wait for the next partition, in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, UntypedStorage

from graphprune.placement.waiting import Held, Waiting

Values: TypeAlias = "dict[str, Any]"
"""Values of a graph by their names."""


class ActivationCache:
    """What waits for the next partition.

    Attributes:
        own: of every batch, packed.
        shared: what is the same for all batches of the same sizes, by these; of the running
            partition as it was computed.
    """

    def __init__(self, sizes: Sequence[Hashable], dtype: torch.dtype, waiting: Waiting) -> None:
        """An empty cache.

        Args:
            sizes: of every batch; equal where all shapes of its inputs are.
            dtype: of the computation.
            waiting: how and where the values of batches are held.
        """
        self._sizes = sizes
        self._room = waiting.room
        self._taken = [0] * len(sizes)  # of the room, by every batch
        self._holder, self._whole = Holder(dtype, waiting), Holder(dtype, Waiting.of(Held()))
        self.own: list[Values] = [{} for _ in sizes]
        self.shared: dict[Hashable, Values] = {size: {} for size in sizes}

    def shared_with(self, batch: int) -> Values:
        """What a batch shares with those of its sizes."""
        return self.shared[self._sizes[batch]]

    def fetch(self, batch: int) -> Values:
        """What is held of a batch, as it is computed with; the cache lets go of it."""
        values, self.own[batch] = self.own[batch], {}
        self._room.taken -= self._taken[batch]
        self._taken[batch] = 0
        return self._holder.unpack(values)

    def hold(self, batch: int, values: Mapping[str, Any]) -> None:
        """Hold the values of a batch until they are fetched."""
        before = self._room.taken
        self.own[batch] = self._holder.pack(values)
        self._taken[batch] = self._room.taken - before

    def pack(self, values: Mapping[str, Any]) -> Values:
        """Values as they are held."""
        return self._holder.pack(values)

    def settle(self, kept: Collection[str]) -> None:
        """Let go of the shared values that no batch needs after a barrier."""
        for size, values in self.shared.items():
            self.shared[size] = self._whole.pack({n: v for n, v in values.items() if n in kept})

    def entries(self) -> list[Values]:
        """What is held of every batch, then of all sizes."""
        return [*self.own, *self.shared.values()]

    def fill(self, entries: Iterator[Mapping[str, Any]]) -> None:
        """Hold other `entries`."""
        self.own = [dict(next(entries)) for _ in self.own]
        back = self._holder.waiting.back
        self.shared = {
            size: {n: mapped(v, back) for n, v in next(entries).items()} for size in self.shared
        }


def nbytes(entries: Iterable[Mapping[str, Any]]) -> int:
    """Memory of values, shared memory counted once."""
    found: dict[int, int] = {}
    for values in entries:
        for x in (t for v in values.values() for t in tensors_in(v)):
            storage = x.untyped_storage()
            found[_place(storage)] = storage.nbytes()
    return sum(found.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, which may be a list of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return tuple(mapped(item, change) for item in value)
    return value


def _place(storage: UntypedStorage) -> int:
    """What tells memory from any other, on every device."""
    return int(storage._cdata)


K = TypeVar("K")

_Known = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
"""Address of memory to a tensor there, which keeps it from being reused, and the converted one."""


class Holder:
    """Brings what is held across a barrier into the form that it is held in, and back.

    Every tensor gets memory of its own size, in order: what a file gives back is then the same to
    the last bit, whatever kernels make of strides. Values that share memory go on sharing it.
    """

    def __init__(self, dtype: torch.dtype, waiting: Waiting) -> None:
        """A holder.

        Args:
            dtype: of the computation.
            waiting: the type that floating tensors are held in, and where.
        """
        self.dtype = dtype
        self.held = waiting.how.dtype or dtype
        self.waiting = waiting
        self._device: torch.device | None = None

    def pack(self, values: Mapping[K, Any]) -> dict[K, Any]:
        """The values as they are held."""
        known: _Known = {}
        away: _Known = {}
        return {n: mapped(v, lambda t: self._packed(t, known, away)) for n, v in values.items()}

    def unpack(self, values: Mapping[K, Any]) -> dict[K, Any]:
        """The values as they are computed with."""
        known: _Known = {}
        return {
            n: mapped(v, lambda t: self._shared(self._back(t), self.dtype, known))
            for n, v in values.items()
        }

    def _packed(self, x: Tensor, known: _Known, away: _Known) -> Tensor:
        x = x.resolve_conj().resolve_neg()  # what memory alone doesn't say
        base = x[tuple(slice(0, 1) if _repeats(x, d) else slice(None) for d in range(x.dim()))]
        if not base.is_contiguous() or base.untyped_storage().nbytes() != base.nbytes:
            base = base.clone(memory_format=torch.contiguous_format)
        return self._away(self._shared(base, self.held, known), away).expand(x.shape)

    def _away(self, x: Tensor, away: _Known) -> Tensor:
        """`x` where it is held; once for all values that share its memory."""
        if not self.waiting.moves:
            return x
        self._device = x.device
        key = (_place(x.untyped_storage()), x.dtype)
        if key not in away:
            away[key] = (x, self.waiting.put(x.flatten()))
        return away[key][1].view(x.shape)

    def _back(self, x: Tensor) -> Tensor:
        """`x` where it is computed with."""
        x = self.waiting.back(x)
        return x if self._device in (None, x.device) else x.to(self._device)

    def _shared(self, x: Tensor, dtype: torch.dtype, known: _Known) -> Tensor:
        """`x` in another dtype; converted once for all values that share its memory."""
        if x.dtype == dtype or x.dtype not in (self.dtype, self.held):
            return x
        if not x.is_contiguous():  # repeated along some dimension
            shown = [slice(0, 1) if _repeats(x, d) else slice(None) for d in range(x.dim())]
            return self._shared(x[tuple(shown)], dtype, known).expand(x.shape)
        key = (_place(x.untyped_storage()), x.dtype)
        if key not in known:
            known[key] = (x, x.flatten().to(dtype))
        return known[key][1].view(x.shape)


def _repeats(x: Tensor, dim: int) -> bool:
    return x.stride(dim) == 0 and x.shape[dim] > 1
