"""The activation cache: how values wait for the next partition, in memory or in files."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from graphprune.checkpoints.memory import page_out
from graphprune.errors import CalibrationError

Values: TypeAlias = "dict[str, Any]"
"""Values of a graph by their names."""

SMALL = 1 << 20  # bytes: less than this stays in memory


@dataclass(frozen=True)
class Held:
    """How activations wait for the next partition.

    Attributes:
        dtype: floating-point ones wait in it; None leaves them in the type of the computation.
        folder: they wait in files there, which have no name and go with the last reader; None keeps
            them in memory.
    """

    dtype: torch.dtype | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, held: torch.dtype | Held | None) -> Held:
        """From a type alone, too."""
        return held if isinstance(held, Held) else cls(held)

    def away(self, x: Tensor) -> Tensor:
        """The tensor, or, where files are wanted, its copy in one, which is contiguous.

        Raises:
            CalibrationError: the file system refuses it.
        """
        if self.folder is None or x.nbytes < SMALL:
            return x
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                reserve(file.fileno(), x.nbytes)
                memory = mmap.mmap(file.fileno(), x.nbytes)
        except OSError as error:
            raise CalibrationError(
                "activations can't wait in a file",
                where=str(self.folder),
                why=error.strerror or str(error),
                hint="free some disk space, choose another folder, or keep them in memory",
            ) from error
        copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
        copy.copy_(x)
        page_out(copy)
        return copy


def reserve(file: int, size: int) -> None:
    """Give a file its blocks: one that lacks them ends the process when it is written to."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


class ActivationCache:
    """What waits for the next partition.

    Attributes:
        own: of every batch, packed.
        shared: what is the same for all batches of the same sizes, by these; of the running
            partition as it was computed.
    """

    def __init__(self, sizes: Sequence[Hashable], dtype: torch.dtype, how: Held) -> None:
        """An empty cache.

        Args:
            sizes: of every batch; equal where all shapes of its inputs are.
            dtype: of the computation.
            how: how the values of batches are held.
        """
        self._sizes = sizes
        self._holder, self._whole = Holder(dtype, how), Holder(dtype, Held())
        self.own: list[Values] = [{} for _ in sizes]
        self.shared: dict[Hashable, Values] = {size: {} for size in sizes}

    def shared_with(self, batch: int) -> Values:
        """What a batch shares with those of its sizes."""
        return self.shared[self._sizes[batch]]

    def fetch(self, batch: int) -> Values:
        """What is held of a batch, as it is computed with; the cache lets go of it."""
        values, self.own[batch] = self.own[batch], {}
        return self._holder.unpack(values)

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
        self.shared = {size: dict(next(entries)) for size in self.shared}


def nbytes(entries: Iterable[Mapping[str, Any]]) -> int:
    """Memory of values, shared memory counted once."""
    found: dict[int, int] = {}
    for values in entries:
        for x in (t for v in values.values() for t in tensors_in(v)):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
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


K = TypeVar("K")

_Known = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
"""Address of memory to a tensor there, which keeps it from being reused, and the converted one."""


class Holder:
    """Brings what is held across a barrier into the form that it is held in, and back.

    Every tensor gets memory of its own size, in order: what a file gives back is then the same to
    the last bit, whatever kernels make of strides. Values that share memory go on sharing it.
    """

    def __init__(self, dtype: torch.dtype, how: Held) -> None:
        """A holder.

        Args:
            dtype: of the computation.
            how: the type that floating tensors are held in, and where.
        """
        self.dtype = dtype
        self.held = how.dtype or dtype
        self.how = how
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
        if self.how.folder is None:
            return x
        self._device = x.device
        key = (x.untyped_storage().data_ptr(), x.dtype)
        if key not in away:
            away[key] = (x, self.how.away(x.flatten()))
        return away[key][1].view(x.shape)

    def _back(self, x: Tensor) -> Tensor:
        """`x` where it is computed with."""
        return x if self._device in (None, x.device) else x.to(self._device)

    def _shared(self, x: Tensor, dtype: torch.dtype, known: _Known) -> Tensor:
        """`x` in another dtype; converted once for all values that share its memory."""
        if x.dtype == dtype or x.dtype not in (self.dtype, self.held):
            return x
        if not x.is_contiguous():  # repeated along some dimension
            shown = [slice(0, 1) if _repeats(x, d) else slice(None) for d in range(x.dim())]
            return self._shared(x[tuple(shown)], dtype, known).expand(x.shape)
        key = (x.untyped_storage().data_ptr(), x.dtype)
        if key not in known:
            known[key] = (x, x.flatten().to(dtype))
        return known[key][1].view(x.shape)


def _repeats(x: Tensor, dim: int) -> bool:
    return x.stride(dim) == 0 and x.shape[dim] > 1
