"""Memory of tensors that nothing holds any more, for tensors to come.

Fresh memory comes in pages of 4 KiB, each of which the system fills with zeros when it is first
touched: that takes longer than writing a tensor to memory which the process already has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_ALIGNMENT = 64
_LARGE = 1 << 20  # bytes: what malloc has lies about for less
_LEFT = 8  # a rest of less than this part of a tensor's memory is let go


class FreedMemory:
    """The memory of one tensor that has gone, handed out from its beginning to its end.

    Tensors in it have storages of their own. It lives as long as one of them does, with what is
    left of it: less than an eighth, but for the last one.
    """

    def __init__(self) -> None:
        """None yet."""
        self._bytes: torch.Tensor | None = None
        self._end = 0

    def offer(self, memory: torch.UntypedStorage) -> None:
        """Take a storage that no tensor has any more, if it is of use.

        Nothing else may be able to see what is written there: files, shared memory and what other
        libraries own is left alone, as is what a tensor still has.

        Args:
            memory: of the caller, who doesn't use it again.
        """
        fits = self._bytes is None and memory.device.type == "cpu" and memory.nbytes() >= _LARGE
        if fits and memory.resizable() and not memory.is_shared() and _is_alone(memory):
            self._bytes, self._end = torch.empty(0, dtype=torch.uint8).set_(memory), 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """A contiguous tensor with any values; None where there is no room for it."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self._bytes is None or not count or self._end + size > len(self._bytes):
            return None
        whole, begin = self._bytes, self._end
        self._end = -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT
        if len(whole) - self._end < len(whole) // _LEFT:
            self._bytes = None
        return torch.frombuffer(whole.numpy(), dtype=dtype, count=count, offset=begin).view(shape)


def _is_alone(memory: torch.UntypedStorage) -> bool:
    """Whether the caller's is the only reference to a storage, in Python and outside."""
    return int(torch._C._storage_Use_Count(memory._cdata)) == 1
