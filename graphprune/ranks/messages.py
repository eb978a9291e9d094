"""Python values as messages: their tensors go as they lie in memory, all else is pickled."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blank:
    """A tensor as far as it can be told beforehand.

    Attributes:
        shape: its shape.
        dtype: its type.
        kind: type of the device that it lies on, such as "cpu".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @classmethod
    def of(cls, tensor: Tensor) -> Blank:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)

    def empty(self) -> Tensor:
        """A tensor to receive into, on this process's device of that kind."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.kind)

    def zeros(self) -> Tensor:
        """A tensor of nothing, to be added."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.kind)


@dataclass(frozen=True)
class Envelope:
    """A value without the content of its tensors.

    Attributes:
        text: pickled.
        blanks: one for each tensor, in order.
    """

    text: bytes
    blanks: tuple[Blank, ...]


def pack(value: Any) -> tuple[Envelope, list[Tensor]]:
    """A value as an envelope, and its tensors."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, one: Any) -> int | None:
            if type(one) is not Tensor:
                return None
            tensors.append(one.detach())
            return len(tensors) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    return Envelope(file.getvalue(), tuple(map(Blank.of, tensors))), tensors


def unpack(envelope: Envelope, tensors: Sequence[Tensor]) -> Any:
    """The value of an envelope."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(envelope.text)).load()


def raw(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Tensors as bytes, which every backend carries whatever their types are."""
    for tensor in tensors:
        if tensor.numel():
            yield tensor.contiguous().reshape(-1).view(torch.uint8)
