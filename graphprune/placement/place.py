"""Where weights, activations and statistics are while a model is calibrated.

Files of weights stay mapped and are read by the processor. A tensor gets to the device in one way,
`Placement.bring`, and what is found there comes back by `Tensor.cpu`, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune.errors import RecipeError
from graphprune.placement.devices import CPU, find_device, free_memory, limited, used_memory


@dataclass(frozen=True)
class Placement:
    """Where a run computes.

    Attributes:
        device: of the weights that are at work, of the activations that fit beside them, of
            statistics, and of whatever is solved with these.
        memory: bytes of the device that may be taken; None for all that are free.
    """

    device: torch.device = CPU
    memory: int | None = None

    @classmethod
    def of(cls, device: str | torch.device | Placement, memory: int | None = None) -> Placement:
        """Find a device; see `find_device` for names and errors.

        Raises:
            RecipeError: it isn't there; or there is a limit to memory of a device, and no device.
        """
        if isinstance(device, Placement):
            return device
        found = find_device(device)
        if memory is not None and found.type == "cpu" and device != "auto":
            raise RecipeError(
                "memory limits what is taken of a device, and the run is on the processor",
                where="memory",
                hint="leave memory out, or name a device; offload: true spares the main memory",
            )
        return cls(found, memory if found.type != "cpu" else None)

    @property
    def away(self) -> bool:
        """Whether it is another device than that of the files."""
        return self.device.type != "cpu"

    @property
    def target(self) -> torch.device | None:
        """Where everything is to go; None where it stays: a model may be on a GPU itself."""
        return self.device if self.away else None

    def bring(self, value: Any) -> Any:
        """A value with its tensors on the device; itself where everything stays."""
        if not self.away:
            return value
        return pytree.tree_map_only(torch.Tensor, self._moved, value)

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.is_meta else x.to(self.device)  # what has no numbers is refused elsewhere

    def room(self) -> int | None:
        """Bytes of the device that may be taken now; None where nobody knows."""
        free = free_memory(self.device)
        known = [] if free is None else [free]
        if self.memory is not None:
            known.append(max(0, self.memory - used_memory(self.device)))
        return min(known) if known else None

    def __str__(self) -> str:
        return str(self.device)


_PROCESSOR = Placement()
_present: ContextVar[Placement] = ContextVar("placement", default=_PROCESSOR)


def present() -> Placement:
    """Where the present run computes: on the processor, unless `on_device` says otherwise."""
    return _present.get()


@contextmanager
def on_device(
    device: str | torch.device | Placement, memory: int | None = None
) -> Iterator[Placement]:
    """Calibrate, solve and score on a device.

    It is true of whatever this thread runs inside::

        with graphprune.on_device("cuda", memory=20 * 2**30):
            found = graphprune.sparsify(program, samples, SparseGPT(), Unstructured(0.5))

    What is found is on the processor, as without it.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``; see `find_device`.
        memory: bytes of the device that may be taken; None for all that are free.

    Raises:
        RecipeError: the device isn't there.
    """
    placement = Placement.of(device, memory)
    token = _present.set(placement)
    try:
        with limited(placement.device, placement.memory):
            yield placement
    finally:
        _present.reset(token)


def settled(device: str | torch.device | Placement | None) -> Placement:
    """The placement that an argument means: the present one where it is None.

    Raises:
        RecipeError: the device isn't there.
    """
    return present() if device is None else Placement.of(device)
